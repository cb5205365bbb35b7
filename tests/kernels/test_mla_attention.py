"""Latent attention over pages: Triton and twin against float64, also against the form that is not absorbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import KernelError
from duoserve.kernels import attention_gqa
from duoserve.kernels import reference_attention as reference
from duoserve.kernels.attention_mla import mla_decode_attention
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits
from tests.kernels.paged_case import paged


def case_of(
    lengths: list[int], num_heads: int, dims: tuple[int, int], page_tokens: int, dtype: torch.dtype, columns: int = 0
) -> dict[str, Any]:
    """Queries, and each sequence's latents."""
    latent_dim, width = dims[0], sum(dims)
    [pages], where = paged(lengths, [(width,)], page_tokens, dtype, columns)
    q = torch.randn(len(lengths), num_heads, width, device=DEVICE).to(dtype)
    queries = {"q_latent_BHL": q[..., :latent_dim], "q_rope_BHR": q[..., latent_dim:]}
    return queries | {"latent_pages_PSW": pages, "scale": width**-0.5} | where


def rows_of(case: dict[str, Any], sequence: int) -> Tensor:
    """A sequence's cache rows in order, float64."""
    pages, length = case["latent_pages_PSW"], int(case["lengths_B"][sequence])
    places = [divmod(c, pages.shape[1]) for c in range(length)]
    return torch.stack([pages[int(case["page_table_BM"][sequence, m]), s] for m, s in places]).double()


def truth_of(case: dict[str, Any]) -> Tensor:
    q_latent, q_rope = case["q_latent_BHL"].double(), case["q_rope_BHR"].double()
    out, latent_dim = torch.zeros_like(q_latent), q_latent.shape[-1]
    for b, length in enumerate(case["lengths_B"].tolist()):
        if length:
            latent, key = rows_of(case, b).split([latent_dim, q_rope.shape[-1]], dim=1)
            scores = (q_latent[b] @ latent.T + q_rope[b] @ key.T) * case["scale"]
            out[b] = scores.softmax(-1) @ latent
    return out


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    num_heads=st.sampled_from([1, 4, 16, 20]),
    dims=st.sampled_from([(16, 16), (64, 8), (96, 32), (128, 64)]),
    page_tokens=st.sampled_from([1, 7, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([32, 128]),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_every_shape(
    lengths: list[int],
    num_heads: int,
    dims: tuple[int, int],
    page_tokens: int,
    dtype: torch.dtype,
    chunk: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    case = case_of(lengths, num_heads, dims, page_tokens, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_gqa, "CHUNK_TOKENS", chunk)
        out = mla_decode_attention(**case)
    # The probabilities are rounded to the dtype too.
    assert_close(out, truth_of(case), dtype, roundings=2)
    assert_close(reference.mla_decode_attention(**case), truth_of(case), dtype)


def test_the_absorbed_form_is_the_plain_one() -> None:
    """With the key and value halves of kv_b_proj applied outside, it is attention over each head's own keys."""
    heads, (latent_dim, rope_dim), nope, value = 3, (32, 16), 8, 12
    case = case_of([21], heads, (latent_dim, rope_dim), 8, torch.float32)
    q_nope, k_up = torch.randn(1, heads, nope, device=DEVICE), torch.randn(heads, nope, latent_dim, device=DEVICE)
    v_up = torch.randn(heads, value, latent_dim, device=DEVICE)
    case["q_latent_BHL"] = torch.einsum("bhn,hnl->bhl", q_nope, k_up)
    out = torch.einsum("bhl,hvl->bhv", mla_decode_attention(**case), v_up)

    latent, key = rows_of(case, 0).split([latent_dim, rope_dim], dim=1)
    for h in range(heads):
        keys = torch.cat((latent @ k_up[h].double().T, key), dim=1)
        query = torch.cat((q_nope[0, h], case["q_rope_BHR"][0, h])).double()
        probs = (keys @ query * case["scale"]).softmax(0)
        # A chain of three float32 products.
        assert_close(out[0, h], probs @ latent @ v_up[h].double().T, torch.float32, roundings=5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    lengths = [520, 1, 40]
    case = case_of(lengths, 4, (32, 16), 64, dtype, columns=64)
    out = mla_decode_attention(**case)
    assert_close(out, truth_of(case), dtype, roundings=2)
    for b, length in enumerate(lengths):
        alone = {name: x[b : b + 1] if name[:2] in ("q_", "pa", "le") else x for name, x in case.items()}
        for columns in (64, 10, -(-length // 64)):
            alone["page_table_BM"] = case["page_table_BM"][b : b + 1, :columns]
            assert_same_bits(mla_decode_attention(**alone)[0], out[b])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_gqa, "MAX_PROGRAMS", 1)
        assert_same_bits(mla_decode_attention(**case), out)


REFUSED = [
    ({"q_rope_BHR": torch.randn(2, 3, 16)}, r"q_rope has shape \(2, 3, 16\); it must be \[2, 4, any\]"),
    ({"q_rope_BHR": torch.randn(2, 4, 8)}, r"latent_pages has shape \(\d+, 8, 48\); it must be \[any, any, 40\]"),
    ({"lengths_B": torch.ones(3, dtype=torch.int32)}, r"lengths has shape"),
    ({"page_table_BM": torch.zeros(2, 2)}, r"page_table is torch.float32"),
    ({"latent_pages_PSW": torch.zeros(3, 8, 96)[..., ::2]}, r"latent_pages must be contiguous"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        mla_decode_attention(**{**case_of([30, 9], 4, (32, 16), 8, torch.float32), **change})
