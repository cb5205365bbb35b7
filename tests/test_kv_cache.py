"""Where new tokens go in the paged KV cache: to rows of their own, which kernels write without a check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from duoserve import kv_cache
from duoserve.errors import IntegrityError
from duoserve.kernels import context_rows
from duoserve.kv_cache import PAGE_TOKENS, PagedKVCache, SequenceKV
from duoserve.models.mixtral import parse_config

CONFIG = parse_config({"model_type": "mixtral", "dtype": "bfloat16", "num_hidden_layers": 1, "num_key_value_heads": 8})


def test_every_token_has_a_row_of_its_own_within_its_pages() -> None:
    cache = PagedKVCache(CONFIG, 8 * PAGE_TOKENS, torch.bfloat16)
    sequences = [SequenceKV(), SequenceKV()]
    seen: set[int] = set()
    for lengths in ((70, 3), (1, 1), (1, 200)):
        for sequence, length in zip(sequences, lengths, strict=True):
            cache.reserve(sequence, sequence.length + length)
        new_tokens = cache.extend([(s, [0] * length) for s, length in zip(sequences, lengths, strict=True)])
        for sequence, (start, stop) in zip(sequences, new_tokens.spans, strict=True):
            assert {row // PAGE_TOKENS for row in new_tokens.rows[start:stop]} <= set(sequence.pages)
        assert len(seen | set(new_tokens.rows)) == len(seen) + sum(lengths)
        seen |= set(new_tokens.rows)
    assert max(seen) < cache.num_tokens and min(seen) >= 0


def test_tokens_without_pages_are_refused() -> None:
    cache, sequence = PagedKVCache(CONFIG, 4 * PAGE_TOKENS, torch.bfloat16), SequenceKV()
    cache.reserve(sequence, PAGE_TOKENS)
    with pytest.raises(IntegrityError, match="65 tokens of a sequence were to go into 1 pages"):
        cache.extend([(sequence, [0] * (PAGE_TOKENS + 1))])
    assert sequence.length == 0


def test_a_step_of_one_token_each_does_not_list_the_rows_of_its_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention goes by the page table; who asks for a context nevertheless gets its rows, listed once."""
    cache, sequences = PagedKVCache(CONFIG, 8 * PAGE_TOKENS, torch.float32), [SequenceKV(), SequenceKV()]
    for num_tokens in (PAGE_TOKENS, 2 * PAGE_TOKENS):  # one after the other, so that no sequence's pages adjoin
        for sequence in sequences:
            cache.reserve(sequence, num_tokens)
    cache.extend([(sequence, [0] * 70) for sequence in sequences])
    listed: list[list[int]] = []

    def listing(pages: list[int], length: int, page_tokens: int) -> torch.Tensor | slice:
        listed.append(pages)
        return context_rows(pages, length, page_tokens)

    monkeypatch.setattr(kv_cache, "context_rows", listing)
    batch = cache.batch(cache.extend([(sequence, [1]) for sequence in sequences]))
    assert batch.is_decode and not listed
    for tensor in cache.layers[0]:
        tensor.copy_(torch.arange(cache.num_tokens).view(-1, PAGE_TOKENS, 1, 1))
    for number, sequence in enumerate(sequences):
        rows = [page * PAGE_TOKENS + place for page in sequence.pages for place in range(PAGE_TOKENS)][:71]
        for context in (*batch.kv.context(0, number), *batch.kv.context(0, number)):
            assert context[:, 0, 0].tolist() == rows
    assert len(listed) == len(sequences)


class Indexed(TorchFunctionMode):
    """Notes where the tensors are by which others are indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            self.by.append(args[1].device.type)
        return func(*args, **(kwargs or {}))


def test_the_rows_of_a_context_are_where_the_cache_is() -> None:
    """Else each layer would send them there anew."""
    cache, sequences = (
        PagedKVCache(CONFIG, 8 * PAGE_TOKENS, torch.bfloat16, device="meta"),
        [SequenceKV(), SequenceKV()],
    )
    for num_tokens in (PAGE_TOKENS, 2 * PAGE_TOKENS):
        for sequence in sequences:
            cache.reserve(sequence, num_tokens)
    batch = cache.batch(cache.extend([(sequence, [0] * 70) for sequence in sequences]))
    with Indexed() as indexed:
        for number in range(len(sequences)):
            assert batch.kv.context(0, number)[1].shape == (70, 8, 128)
    assert indexed.by == ["meta"] * 4
