"""Decode attention over pages: Triton and twin against float64, with poison wherever nothing may be read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import KernelError
from duoserve.kernels import attention_gqa as attention
from duoserve.kernels import reference_attention as reference
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits, poisoned
from tests.kernels.paged_case import GARBAGE_PAGE, paged


def case_of(
    lengths: list[int], heads: tuple[int, int], dim: int, page_tokens: int, dtype: torch.dtype, columns: int = 0
) -> dict[str, Any]:
    """Queries, and the keys and values of each sequence."""
    num_heads, num_kv_heads = heads
    (k_pages, v_pages), where = paged(lengths, [(num_kv_heads, dim)] * 2, page_tokens, dtype, columns)
    q = torch.randn(len(lengths), num_heads, dim, device=DEVICE).to(dtype)
    return {"q_BHD": q, "k_pages_PSGD": k_pages, "v_pages_PSGD": v_pages, "scale": dim**-0.5} | where


def truth_of(case: dict[str, Any], window: int | None = None, sinks: Tensor | None = None) -> Tensor:
    """Token by token and head by head in float64."""
    q, k_pages, v_pages = case["q_BHD"].double(), case["k_pages_PSGD"], case["v_pages_PSGD"]
    page_tokens, num_kv_heads = k_pages.shape[1:3]
    out = torch.zeros_like(q)
    for b, length in enumerate(case["lengths_B"].tolist()):
        seen = range(0 if window is None else max(0, length - window), length)
        places = [(int(case["page_table_BM"][b, c // page_tokens]), c % page_tokens) for c in seen]
        for h in range(q.shape[1]) if length else ():
            g = h // (q.shape[1] // num_kv_heads)
            keys, values = (torch.stack([store[p, s, g] for p, s in places]).double() for store in (k_pages, v_pages))
            scores = keys @ q[b, h] * case["scale"]
            extra = scores.new_full((1,), -math.inf if sinks is None else float(sinks[h]))
            out[b, h] = torch.cat((scores, extra)).softmax(0)[:-1] @ values
    return out


def assert_attends(case: dict[str, Any], window: int | None = None, sinks: Tensor | None = None) -> Tensor:
    """Both implementations against the truth. The probabilities' rounding to the dtype is one more on the way."""
    out = attention.decode_attention(**case, window=window, sinks_H=sinks)
    twin, truth = reference.decode_attention(**case, window=window, sinks_H=sinks), truth_of(case, window, sinks)
    dtype = out.dtype
    for result in (out, twin):
        assert result.dtype == dtype
        assert_close(result, truth, dtype, roundings=2)
    return out


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 4), (4, 2), (5, 1), (20, 1)]),
    dim=st.sampled_from([8, 64, 96, 128]),
    page_tokens=st.sampled_from([1, 7, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    window=st.one_of(st.none(), st.integers(1, 100)),
    with_sinks=st.booleans(),
    chunk=st.sampled_from([64, 128]),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None)
def test_every_shape(
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    page_tokens: int,
    dtype: torch.dtype,
    window: int | None,
    with_sinks: bool,
    chunk: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    sinks = torch.randn(heads[0], device=DEVICE).to(dtype) if with_sinks else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CHUNK_TOKENS", chunk)
        assert_attends(case_of(lengths, heads, dim, page_tokens, dtype), window, sinks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_full_size(dtype: torch.dtype) -> None:
    """Lengths about the edges of the real chunks, more chunks than one merge block takes at a time."""
    assert attention.CHUNK_TOKENS == 256
    assert_attends(case_of([255, 256, 257, 700], (4, 2), 16, 32, dtype), window=300)


def test_long_contexts_have_longer_chunks_and_the_merge_takes_them_all() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CHUNK_TOKENS", 32)
        patch.setattr(attention, "MAX_CHUNKS", 4)
        assert attention.plan_chunks(128, 1) == (32, 4, 4)
        assert attention.plan_chunks(129, 1) == (64, 3, 3)
        assert_attends(case_of([200, 3], (2, 1), 16, 10, torch.float32))


def test_a_padded_row_is_zero_and_a_length_beyond_the_table_is_the_tables() -> None:
    case = case_of([0, 20], (2, 2), 16, 4, torch.float32)
    case["lengths_B"] = torch.tensor([-5, 23], dtype=torch.int32, device=DEVICE)
    out = attention.decode_attention(**case)
    case["lengths_B"] = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
    assert_same_bits(out, attention.decode_attention(**case))
    assert bool((out[0] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    """Whatever the others are, however wide the table is and however many programs share the chunks."""
    lengths = [600, 1, 40, 513]
    case = case_of(lengths, (4, 2), 16, 64, dtype, columns=64)
    out = attention.decode_attention(**case, window=400)
    for b, length in enumerate(lengths):
        alone = dict(case, q_BHD=case["q_BHD"][b : b + 1], lengths_B=case["lengths_B"][b : b + 1])
        for columns in (64, 12, -(-length // 64)):
            alone["page_table_BM"] = case["page_table_BM"][b : b + 1, :columns]
            assert_same_bits(attention.decode_attention(**alone, window=400)[0], out[b])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_PROGRAMS", 1)
        assert_same_bits(attention.decode_attention(**case, window=400), out)


def test_where_the_pages_lie_does_not_matter() -> None:
    case = case_of([70, 33], (4, 1), 32, 16, torch.float16)
    out = attention.decode_attention(**case)
    order = torch.randperm(len(case["k_pages_PSGD"]))
    moved = dict(case, k_pages_PSGD=case["k_pages_PSGD"][order], v_pages_PSGD=case["v_pages_PSGD"][order])
    place = {int(page): i for i, page in enumerate(order)} | {GARBAGE_PAGE: GARBAGE_PAGE}
    moved["page_table_BM"] = case["page_table_BM"].cpu().apply_(place.__getitem__).to(DEVICE)
    assert_same_bits(attention.decode_attention(**moved), out)


def test_indices_of_64_bits_and_queries_that_are_a_slice() -> None:
    case = case_of([30, 9], (4, 2), 16, 8, torch.float32)
    out = attention.decode_attention(**case)
    wide = poisoned(2, 8, 16, dtype=torch.float32)
    wide[:, 2:6] = case["q_BHD"]
    case |= {name: case[name].long() for name in ("page_table_BM", "lengths_B")}
    case["q_BHD"] = wide[:, 2:6]
    assert_same_bits(attention.decode_attention(**case), out)


def test_a_large_score_does_not_overflow() -> None:
    torch.manual_seed(0)  # of two scores that are all but equal, rounding would decide what each weighs
    case = case_of([50], (2, 1), 16, 16, torch.float32)
    case["q_BHD"] = case["q_BHD"] * 1000
    assert_attends(case)


REFUSED = [
    ({"q_BHD": torch.randn(2, 3, 16)}, r"3 query heads cannot share 2 KV heads evenly"),
    ({"q_BHD": torch.randn(2, 4, 16).half()}, r"k_pages is torch.float32; it must be torch.float16"),
    ({"lengths_B": torch.ones(3, dtype=torch.int32)}, r"lengths has shape \(3,\); it must be \[2\]"),
    ({"lengths_B": torch.ones(2)}, r"lengths is torch.float32"),
    ({"page_table_BM": torch.zeros(2, 0, dtype=torch.int32)}, r"page_table has no columns"),
    ({"window": 0}, r"window is 0"),
    ({"sinks_H": torch.zeros(3)}, r"sinks has shape \(3,\); it must be \[4\]"),
    ({"v_pages_PSGD": torch.zeros(9, 8, 2, 16)}, r"v_pages has shape"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        attention.decode_attention(**{**case_of([30, 9], (4, 2), 16, 8, torch.float32), **change})
