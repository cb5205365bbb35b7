"""Where a sequence's tokens are in a paged cache. C context tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def context_rows(pages: Sequence[int], length: int, page_tokens: int) -> Tensor | slice:
    """The cache rows [C] of a sequence's ``length`` tokens, in order, from its pages on the host.

    They are a slice, which reads a tensor without a copy, if the pages adjoin; else int64 on the CPU.
    """
    used = list(pages[: -(-length // page_tokens)])
    if used == list(range(used[0], used[0] + len(used))):
        return slice(used[0] * page_tokens, used[0] * page_tokens + length)
    starts_M1 = torch.tensor(used, device="cpu")[:, None] * page_tokens
    return (starts_M1 + torch.arange(page_tokens, device="cpu")).flatten()[:length]
