"""Host memory for rows of experts. N rows."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from duoserve.errors import MemoryBudgetError
from duoserve.experts.layout import ROW_ALIGNMENT


def aligned_rows(n: int, row_bytes: int) -> Tensor:
    """Zeroed uint8 memory [n, row_bytes], every row page-aligned, every page backed; ``row_bytes`` % 4096 is 0.

    The memory lives as long as a tensor that views it. MemoryBudgetError when the system refuses it.
    """
    if row_bytes % ROW_ALIGNMENT:
        raise ValueError(f"rows of {row_bytes} bytes cannot all start on a multiple of {ROW_ALIGNMENT} bytes")
    nbytes = n * row_bytes
    if nbytes == 0:
        return torch.empty((n, row_bytes), dtype=torch.uint8)
    try:
        # Private, for the default (shared) would be charged to tmpfs and keep transparent huge pages away.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryBudgetError(
            f"{n} rows of {row_bytes} bytes need {nbytes} bytes of RAM, which the system refused ({error}); "
            "give the experts fewer slots or less host memory"
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        # Direct reads pin every page that they write to: in huge ones they were measured 2.5 times as fast.
        memory.madvise(mmap.MADV_HUGEPAGE)
    flat_B = torch.frombuffer(memory, dtype=torch.uint8)
    flat_B[:: mmap.PAGESIZE] = 0  # a page is there only once it was written to: better now than in mid-request
    return flat_B.view(n, row_bytes)
