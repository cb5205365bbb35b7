"""Page-locked host memory, which a CUDA device reads by itself and at the link's full rate."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor


def pin(rows_NB: Tensor) -> bool:
    """Page-locks memory that is in use already; False, with a warning, where the system refuses.

    torch's own allocator of such memory rounds up to a power of two, which for a model's experts is too much. Copies
    from memory that was refused are as right, only slower. Python shows the warning once, however often it comes.
    """
    if not rows_NB.nbytes:
        return False
    status = torch.cuda.cudart().cudaHostRegister(rows_NB.data_ptr(), rows_NB.nbytes, 0)
    if int(status) == 0:
        return True
    _forget_error()
    warnings.warn(
        f"host memory could not be page-locked (CUDA error {int(status)}): copies to the GPU will be slower; raise the "
        "limit of locked memory (ulimit -l) or lower host_memory",
        RuntimeWarning,
        stacklevel=1,  # one place: Python shows it once
    )
    return False


def unpin(rows_NB: Tensor) -> None:
    """Undoes a ``pin`` that was granted, before the memory goes."""
    torch.cuda.cudart().cudaHostUnregister(rows_NB.data_ptr())


def _forget_error() -> None:
    """CUDA keeps the error of a call that was refused, and torch would take it for that of its next launch."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
