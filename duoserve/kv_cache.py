"""Paged KV cache: one buffer of pages a layer, lent to sequences.

L layers, P pages, S tokens a page, B sequences, M pages of the longest, T new tokens, C context tokens, G KV heads, D
head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.errors import IntegrityError, MemoryBudgetError
from duoserve.kernels import context_rows
from duoserve.models.batch import Batch

PAGE_TOKENS = 64


def pages_for(num_tokens: int) -> int:
    """The number of pages that ``num_tokens`` tokens take."""
    return -(-num_tokens // PAGE_TOKENS)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token of context takes over all layers."""
    kv = config.blocks.attention.kv
    return config.num_layers * kv.heads * (kv.key_dim + kv.value_dim) * dtype.itemsize


class NewTokens(NamedTuple):
    """The new tokens of a pass and where they go, on the host; a Batch is made from it.

    ``token_ids``, ``positions`` and ``rows`` (of the cache: ``page * S + place``) have an entry for each new token;
    ``spans``, ``lengths`` and ``page_table`` for each sequence. The page table has -1 behind a sequence's pages.
    """

    token_ids: list[int]
    positions: list[int]
    rows: list[int]
    spans: tuple[tuple[int, int], ...]
    lengths: list[int]
    page_table: list[list[int]]

    @property
    def last_rows(self) -> list[int]:
        """The row of each sequence's last new token."""
        return [stop - 1 for _, stop in self.spans]


@dataclass(eq=False)
class SequenceKV:
    """One sequence's pages and how many of its tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def room(self) -> int:
        """Tokens that its pages hold."""
        return len(self.pages) * PAGE_TOKENS


class PagedKVCache:
    """Pages on ``device`` for ``max_tokens`` tokens of context over all sequences, allocated once."""

    def __init__(
        self, config: ModelConfig, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.num_pages = pages_for(max_tokens)
        kv = config.blocks.attention.kv
        shape = (self.num_pages, PAGE_TOKENS, kv.heads)
        self.layers = tuple(
            tuple(torch.empty((*shape, dim), dtype=dtype, device=device) for dim in (kv.key_dim, kv.value_dim))
            for _ in range(config.num_layers)
        )
        self.device = torch.device(device)
        self._free = list(range(self.num_pages))

    @property
    def num_tokens(self) -> int:
        """Tokens of context that all pages hold together."""
        return self.num_pages * PAGE_TOKENS

    @staticmethod
    def whole_pages(num_tokens: int) -> int:
        """``num_tokens`` rounded up to whole pages, in tokens."""
        return pages_for(num_tokens) * PAGE_TOKENS

    def reserve(self, sequence: SequenceKV, num_tokens: int) -> None:
        """Gives ``sequence`` pages for ``num_tokens`` tokens in all; raises MemoryBudgetError if too few are free."""
        missing = pages_for(num_tokens) - len(sequence.pages)
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

    @property
    def free_tokens(self) -> int:
        """Tokens of context that all free pages hold together."""
        return len(self._free) * PAGE_TOKENS

    def check_integrity(self, sequences: Seq[SequenceKV]) -> None:
        """Raises IntegrityError unless every page is free or belongs to one of ``sequences`` (all that there are)."""
        pages = sorted([*self._free, *(page for sequence in sequences for page in sequence.pages)])
        if pages != list(range(self.num_pages)):
            raise IntegrityError(f"pages {pages} are free or lent, but there are {self.num_pages}, each once")

    def extend(self, tokens_of: Seq[tuple[SequenceKV, Seq[int]]]) -> NewTokens:
        """Places each sequence's new tokens and advances its length.

        Raises IntegrityError if a sequence has too few pages for them: kernels write to these rows without a check.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        spans, rows = [], []
        for sequence, tokens in tokens_of:
            new = range(sequence.length, sequence.length + len(tokens))
            if new.stop > len(sequence.pages) * PAGE_TOKENS:
                raise IntegrityError(f"{new.stop} tokens of a sequence were to go into {len(sequence.pages)} pages")
            spans.append((len(token_ids), len(token_ids) + len(tokens)))
            token_ids += tokens
            positions += new
            rows += [sequence.pages[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS for at in new]
            sequence.length += len(tokens)
        sequences = [sequence for sequence, _ in tokens_of]
        return NewTokens(
            token_ids,
            positions,
            rows,
            tuple(spans),
            lengths=[sequence.length for sequence in sequences],
            page_table=self._page_table(sequences),
        )

    def batch(self, new_tokens: NewTokens) -> Batch:
        """The forward pass over these tokens, on the device."""
        kv = BatchKV(
            cache=self,
            rows_T=self._on_device(new_tokens.rows, torch.int64),
            page_table_BM=self._on_device(new_tokens.page_table, torch.int32),
            lengths_B=self._on_device(new_tokens.lengths, torch.int32),
            new_tokens=new_tokens,
        )
        token_ids_T = self._on_device(new_tokens.token_ids, torch.int64)
        return Batch(token_ids_T, self._on_device(new_tokens.positions, torch.int64), new_tokens.spans, kv)

    def _on_device(self, values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _page_table(self, sequences: Seq[SequenceKV]) -> list[list[int]]:
        """The pages [B][M] of each sequence, -1 behind its last; M is a power of two, so that few shapes occur."""
        longest = max(len(sequence.pages) for sequence in sequences)
        width = min(1 << (longest - 1).bit_length(), self.num_pages)
        return [sequence.pages + [-1] * (width - len(sequence.pages)) for sequence in sequences]


@dataclass(frozen=True)
class BatchKV:
    """The KV store of one forward pass: where its new tokens go, and which pages each sequence reads.

    ``context`` needs ``new_tokens``, which has the pages and lengths of the sequences on the host.
    """

    cache: PagedKVCache
    rows_T: Tensor
    page_table_BM: Tensor
    lengths_B: Tensor
    new_tokens: NewTokens | None = None

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        k_PSGD, v_PSGD = self.cache.layers[layer]
        return k_PSGD, v_PSGD

    def context(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        rows_C = self._contexts[sequence]
        k_PSGD, v_PSGD = self.pages(layer)
        return k_PSGD.flatten(0, 1)[rows_C], v_PSGD.flatten(0, 1)[rows_C]

    @cached_property
    def _contexts(self) -> tuple[slice | Tensor, ...]:
        """The rows of each sequence's context; passes that read by page table do not need them.

        Where its pages do not adjoin, the rows are on the cache's device: from a list on the host, each layer would
        send them to a GPU twice, for keys and for values, and the host would wait for that.
        """
        assert self.new_tokens is not None, "a recorded step reads contexts by page table"
        tables = zip(self.new_tokens.page_table, self.new_tokens.lengths, strict=True)
        rows = (context_rows(pages, length, PAGE_TOKENS) for pages, length in tables)
        return tuple(one if isinstance(one, slice) else one.to(self.cache.device) for one in rows)
