"""Paged KV cache: one buffer of pages a layer, lent to sequences.

L layers, P pages, S tokens a page, B sequences, M pages of the longest, T new tokens, C context tokens, G KV heads, D
head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.errors import MemoryBudgetError
from duoserve.kernels import context_rows
from duoserve.models.batch import Batch

PAGE_TOKENS = 64


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token of context takes over all layers."""
    kv = config.blocks.attention.kv
    return config.num_layers * kv.heads * (kv.key_dim + kv.value_dim) * dtype.itemsize


@dataclass(eq=False)
class SequenceKV:
    """One sequence's pages and how many of its tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedKVCache:
    """Pages on ``device`` for ``max_tokens`` tokens of context over all sequences, allocated once."""

    def __init__(
        self, config: ModelConfig, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.num_pages = -(-max_tokens // PAGE_TOKENS)
        kv = config.blocks.attention.kv
        shape = (config.num_layers, self.num_pages, PAGE_TOKENS, kv.heads)
        self.k_LPSGD = torch.empty((*shape, kv.key_dim), dtype=dtype, device=device)
        self.v_LPSGD = torch.empty((*shape, kv.value_dim), dtype=dtype, device=device)
        self._device = device
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
        spans, rows = [], []
        for sequence, tokens in new_tokens:
            new = range(sequence.length, sequence.length + len(tokens))
            spans.append((len(token_ids), len(token_ids) + len(tokens)))
            token_ids += tokens
            positions += new
            rows += [sequence.pages[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS for at in new]
            sequence.length += len(tokens)
        sequences = [sequence for sequence, _ in new_tokens]
        kv = BatchKV(
            cache=self,
            rows_T=self._on_device(rows, torch.int64),
            page_table_BM=self._on_device(_page_table(sequences), torch.int32),
            lengths_B=self._on_device([sequence.length for sequence in sequences], torch.int32),
            contexts=tuple(context_rows(sequence.pages, sequence.length, PAGE_TOKENS) for sequence in sequences),
        )
        tokens_T, positions_T = (self._on_device(values, torch.int64) for values in (token_ids, positions))
        return Batch(tokens_T, positions_T, tuple(spans), kv)

    def _on_device(self, values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _page_table(sequences: Seq[SequenceKV]) -> list[list[int]]:
    """The pages [B][M] of each sequence, -1 after its last."""
    longest = max(len(sequence.pages) for sequence in sequences)
    return [sequence.pages + [-1] * (longest - len(sequence.pages)) for sequence in sequences]


@dataclass(frozen=True)
class BatchKV:
    """The KV store of one forward pass: where its new tokens go, and which pages each sequence reads."""

    cache: PagedKVCache
    rows_T: Tensor
    page_table_BM: Tensor
    lengths_B: Tensor
    contexts: tuple[slice | Tensor, ...]

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.k_LPSGD[layer], self.cache.v_LPSGD[layer]

    def context(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        rows_C = self.contexts[sequence]
        k_PSGD, v_PSGD = self.pages(layer)
        return k_PSGD.flatten(0, 1)[rows_C], v_PSGD.flatten(0, 1)[rows_C]
