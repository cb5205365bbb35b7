"""The norms against their twins and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import KernelError
from duoserve.kernels import reference_small as reference
from duoserve.kernels.norm import add_rms_norm, rms_norm
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits, poisoned

EPS = 1e-5


def truth_of(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@given(
    rows=st.integers(0, 9),
    hidden=st.sampled_from([1, 24, 96, 128, 1000, 2048]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_rms_norm(rows: int, hidden: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, hidden, device=DEVICE).to(dtype)
    weight = torch.randn(hidden, device=DEVICE).to(dtype)
    out = rms_norm(x, weight, EPS)
    # Rounded before the weight and after it.
    assert_close(out, truth_of(x, weight), dtype, roundings=2)
    assert_close(reference.rms_norm(x, weight, EPS), truth_of(x, weight), dtype, roundings=2)
    assert_close(out, reference.rms_norm(x, weight, EPS), dtype)


@given(rows=st.integers(1, 5), hidden=st.sampled_from([8, 96, 640]), dtype=st.sampled_from(DTYPES))
@settings(max_examples=20, deadline=None)
def test_add_rms_norm(rows: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows * hidden)
    x, residual = (torch.randn(rows, hidden, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device=DEVICE).to(dtype)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert_same_bits(total, x + residual)
    assert_same_bits(normed, rms_norm(total, weight, EPS))
    assert_close(normed, reference.add_rms_norm(x, residual, weight, EPS)[0], dtype)
    assert_same_bits(x, before[0])
    assert_same_bits(residual, before[1])


@pytest.mark.parametrize("hidden", [16, 1536])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(hidden: int) -> None:
    x, weight = torch.randn(70, hidden, device=DEVICE), torch.randn(hidden, device=DEVICE)
    out = rms_norm(x, weight, EPS)
    for row in (0, 1, 37, 69):
        assert_same_bits(rms_norm(x[row : row + 1], weight, EPS)[0], out[row])


def test_heads_are_normed_in_place_of_a_wider_tensor() -> None:
    """The norm of query heads: x is a slice of the stacked projections, and what lies between its rows is not read."""
    qkv = poisoned(3, 6, 16, dtype=torch.float16)
    qkv[:, :4] = torch.randn(3, 4, 16).half()
    weight = torch.randn(16, device=DEVICE).half()
    out = rms_norm(qkv[:, :4], weight, EPS)
    assert out.is_contiguous()
    assert_close(out, truth_of(qkv[:, :4], weight), torch.float16, roundings=2)


def test_nan_stays_in_its_row() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    x[1, 2] = float("nan")
    assert rms_norm(x, weight, EPS).isnan().any(1).tolist() == [False, True, False]


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(KernelError, match=r"weight has shape \(8,\); it must be \[7\]"):
        rms_norm(x[:, :7], weight, EPS)
    with pytest.raises(KernelError, match=r"weight is torch.float16"):
        rms_norm(x, weight.half(), EPS)
    with pytest.raises(KernelError, match=r"residual has shape \(2, 8\)"):
        add_rms_norm(x, x[:2], weight, EPS)
    with pytest.raises(KernelError, match=r"rows of 40000 elements; they must have 1 to 32768"):
        rms_norm(torch.ones(1, 40000, device=DEVICE), torch.ones(40000, device=DEVICE), EPS)
