"""Paged KV cache: one buffer of pages a layer, lent to sequences.

L layers, R = pages * page size rows, T new tokens, C context tokens, G KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.errors import MemoryBudgetError
from duoserve.models.batch import Batch

PAGE_TOKENS = 64


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token of context takes over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


@dataclass(eq=False)
class SequenceKV:
    """One sequence's pages and how many of its tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedKVCache:
    """Pages for ``max_tokens`` tokens of context over all sequences, allocated once."""

    def __init__(self, config: ModelConfig, max_tokens: int, dtype: torch.dtype) -> None:
        self.num_pages = -(-max_tokens // PAGE_TOKENS)
        shape = (config.num_layers, self.num_pages * PAGE_TOKENS, config.num_kv_heads, config.head_dim)
        self.k_LRGD = torch.empty(shape, dtype=dtype)
        self.v_LRGD = torch.empty(shape, dtype=dtype)
        self._free = list(range(self.num_pages))

    @property
    def num_tokens(self) -> int:
        """Tokens of context that all pages hold together."""
        return self.num_pages * PAGE_TOKENS

    @staticmethod
    def whole_pages(num_tokens: int) -> int:
        """``num_tokens`` rounded up to whole pages, in tokens."""
        return -(-num_tokens // PAGE_TOKENS) * PAGE_TOKENS

    def reserve(self, sequence: SequenceKV, num_tokens: int) -> None:
        """Gives ``sequence`` pages for ``num_tokens`` tokens in all; MemoryBudgetError when too few are free."""
        missing = self.whole_pages(num_tokens) // PAGE_TOKENS - len(sequence.pages)
        if missing > len(self._free):
            raise MemoryBudgetError(
                f"the KV cache has room for {len(self._free) * PAGE_TOKENS} more tokens and {missing * PAGE_TOKENS} "
                f"are needed: raise max_context (now {self.num_tokens}) or ask for fewer tokens"
            )
        if missing > 0:
            sequence.pages += self._free[:missing]
            del self._free[:missing]

    def release(self, sequence: SequenceKV) -> None:
        """Takes all pages of ``sequence`` back; doing so twice is harmless."""
        self._free = sorted(self._free + sequence.pages)
        sequence.pages, sequence.length = [], 0

    def batch(self, new_tokens: Seq[tuple[SequenceKV, Seq[int]]]) -> Batch:
        """A forward pass over each sequence's new tokens, for which it must have pages; advances their lengths."""
        token_ids: list[int] = []
        positions: list[int] = []
        spans, stores = [], []
        for sequence, tokens in new_tokens:
            spans.append((len(token_ids), len(token_ids) + len(tokens)))
            token_ids += tokens
            positions += range(sequence.length, sequence.length + len(tokens))
            sequence.length += len(tokens)
            stores.append(self._rows(sequence))
        new_rows = [rows[-(stop - start) :] for rows, (start, stop) in zip(stores, spans, strict=True)]
        kv = BatchKV(self, torch.cat(new_rows), [_as_slice(rows) for rows in stores])
        return Batch(torch.tensor(token_ids), torch.tensor(positions), tuple(spans), kv)

    def _rows(self, sequence: SequenceKV) -> Tensor:
        """The buffer rows [C] of a sequence's tokens, in order."""
        starts = torch.tensor(sequence.pages)[:, None] * PAGE_TOKENS
        return (starts + torch.arange(PAGE_TOKENS)).flatten()[: sequence.length]


def _as_slice(rows_C: Tensor) -> Tensor | slice:
    """The same rows as a slice when they are adjacent, so that reading them copies nothing."""
    first, last = int(rows_C[0]), int(rows_C[-1])
    adjacent = last - first + 1 == len(rows_C) and bool((rows_C.diff() == 1).all())
    return slice(first, last + 1) if adjacent else rows_C


@dataclass(frozen=True)
class BatchKV:
    """The KV store of one forward pass: where its new tokens go, and which rows each sequence reads."""

    cache: PagedKVCache
    new_rows_T: Tensor
    context_rows: list[Tensor | slice]

    def append(self, layer: int, k_TGD: Tensor, v_TGD: Tensor) -> None:
        self.cache.k_LRGD[layer][self.new_rows_T] = k_TGD
        self.cache.v_LRGD[layer][self.new_rows_T] = v_TGD

    def context(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        rows = self.context_rows[sequence]
        return self.cache.k_LRGD[layer][rows], self.cache.v_LRGD[layer][rows]
