"""Where new tokens go in the paged KV cache: to rows of their own, which kernels write without a check."""

from __future__ import annotations

import pytest
import torch

from duoserve.errors import IntegrityError
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
        layout = cache.lay_out([(s, [0] * length) for s, length in zip(sequences, lengths, strict=True)])
        for sequence, (start, stop) in zip(sequences, layout.spans, strict=True):
            assert {row // PAGE_TOKENS for row in layout.rows[start:stop]} <= set(sequence.pages)
        assert len(seen | set(layout.rows)) == len(seen) + sum(lengths)
        seen |= set(layout.rows)
    assert max(seen) < cache.num_tokens and min(seen) >= 0


def test_tokens_without_pages_are_refused() -> None:
    cache, sequence = PagedKVCache(CONFIG, 4 * PAGE_TOKENS, torch.bfloat16), SequenceKV()
    cache.reserve(sequence, PAGE_TOKENS)
    with pytest.raises(IntegrityError, match="65 tokens of a sequence were laid out in 1 pages"):
        cache.lay_out([(sequence, [0] * (PAGE_TOKENS + 1))])
    assert sequence.length == 0
