"""Where a sequence's tokens are in a paged cache. C context tokens, M pages a sequence may have."""

from __future__ import annotations

import torch
from torch import Tensor


def context_rows(pages_M: Tensor, length: int, page_tokens: int) -> Tensor | slice:
    """The cache rows of a sequence's ``length`` tokens, in order; a slice, which copies nothing, where they adjoin."""
    pages = pages_M[: -(-length // page_tokens)].tolist()
    first = pages[0] * page_tokens
    if pages == list(range(pages[0], pages[0] + len(pages))):
        return slice(first, first + length)
    tokens_C = torch.arange(length, device=pages_M.device)
    return pages_M[tokens_C // page_tokens].long() * page_tokens + tokens_C % page_tokens
