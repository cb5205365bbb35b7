"""Host memory for what is computed with: rows of experts (N of them), and dense weights."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from duoserve.errors import MemoryBudgetError
from duoserve.experts.layout import ROW_ALIGNMENT

DENSE_ALIGNMENT = 64  # what vectors and cache lines want


def aligned_rows(n: int, row_bytes: int) -> Tensor:
    """Zeroed uint8 memory [n, row_bytes], every row page-aligned, every page backed; ``row_bytes`` % 4096 is 0.

    The memory lives as long as a tensor that views it. MemoryBudgetError when the system refuses it.
    """
    if row_bytes % ROW_ALIGNMENT:
        raise ValueError(f"rows of {row_bytes} bytes cannot all start on a multiple of {ROW_ALIGNMENT} bytes")
    nbytes = n * row_bytes
    if nbytes == 0:
        return torch.empty((n, row_bytes), dtype=torch.uint8, device="cpu")
    try:
        flat_B = _huge_pages(nbytes)
    except (OSError, OverflowError) as error:
        raise MemoryBudgetError(
            f"{n} rows of {row_bytes} bytes need {nbytes} bytes of RAM, which the system refused ({error}); "
            "give the experts fewer slots or less host memory"
        ) from error
    flat_B[:: mmap.PAGESIZE] = 0  # a page is there only once it was written to: better now than in mid-request
    return flat_B.view(n, row_bytes)


class DenseMemory:
    """Room for dense weights of these ``sizes`` (bytes), side by side. MemoryBudgetError when the system refuses it."""

    def __init__(self, sizes: Iterable[int]) -> None:
        nbytes = sum(_aligned(size) for size in sizes)
        try:
            self._memory_B = _huge_pages(nbytes) if nbytes else torch.empty(0, dtype=torch.uint8, device="cpu")
        except (OSError, OverflowError) as error:
            raise MemoryBudgetError(
                f"the dense weights need {nbytes} bytes of RAM, which the system refused ({error})"
            ) from error
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values in this memory, which lives as long; ``tensor`` itself where no room is left."""
        start, stop = self._used, self._used + tensor.nbytes
        if tensor.nbytes == 0 or stop > len(self._memory_B):
            return tensor
        self._used = _aligned(stop)
        return self._memory_B[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // DENSE_ALIGNMENT) * DENSE_ALIGNMENT


def _huge_pages(nbytes: int) -> Tensor:
    """Zeroed uint8 memory, in huge pages where the kernel has them; OSError or OverflowError when it is refused.

    Direct reads pin every page that they write to: in huge ones they were measured 2.5 times as fast. And a guest of a
    hypervisor looks each page up twice (bench/LOG.md has what that costs a decode step).
    """
    # Private, for the default (shared) would be charged to tmpfs and keep transparent huge pages away.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
