"""Rows of a KV cache for tests of decode attention, those of each sequence scattered over pages.

Shapes: B sequences, M pages of a sequence, P pages, S rows of a page; ``rest`` is the shape of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.common import DEVICE, poisoned

GARBAGE_PAGE = 1 << 20  # in the table where a sequence has no page: reading it would be far out of bounds


def paged(
    lengths: list[int], rests: list[tuple[int, ...]], page_tokens: int, dtype: torch.dtype, columns: int = 0
) -> tuple[list[Tensor], dict[str, Any]]:
    """Pages [P, S, *rest] for each of ``rests``, poisoned where no sequence has a row; the arguments that say where."""
    counts = [-(-length // page_tokens) for length in lengths]
    num_pages, columns = sum(counts) + 2, max([1, columns, *counts])
    stores = [poisoned(num_pages, page_tokens, *rest, dtype=dtype) for rest in rests]
    table_BM = torch.full((len(lengths), columns), GARBAGE_PAGE, dtype=torch.int32)
    free = torch.randperm(num_pages).tolist()
    for b, length in enumerate(lengths):
        for m in range(counts[b]):
            page = table_BM[b, m] = free.pop()
            used = min(page_tokens, length - m * page_tokens)
            for store in stores:
                store[page, :used] = torch.randn(used, *store.shape[2:]).to(dtype)
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return stores, {"page_table_BM": table_BM.to(DEVICE), "lengths_B": lengths_B}
