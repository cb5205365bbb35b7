"""Page-locked host memory, which a CUDA device reads by itself and at the link's full rate."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def pin(rows_NB: Tensor) -> bool:
    """Page-locks memory that is in use already; False, with a warning, where the system refuses.

    torch's own allocator of such memory rounds up to a power of two, which for a model's experts is too much. Copies
    from memory that was refused are as right, only slower.
    """
    if not rows_NB.nbytes:
        return False
    status = torch.cuda.cudart().cudaHostRegister(rows_NB.data_ptr(), rows_NB.nbytes, 0)
    if int(status) == 0:
        return True
    warnings.warn(
        f"{rows_NB.nbytes} bytes of host memory could not be page-locked (CUDA error {int(status)}): copies to the GPU "
        "will be slower; raise the limit of locked memory (ulimit -l) or lower host_memory",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def unpin(rows_NB: Tensor) -> None:
    """Undoes a ``pin`` that was granted, before the memory goes."""
    torch.cuda.cudart().cudaHostUnregister(rows_NB.data_ptr())
