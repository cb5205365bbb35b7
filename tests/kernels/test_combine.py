"""The combine against its twin, bit for bit, and both against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import KernelError
from duoserve.kernels import reference_small as reference
from duoserve.kernels.combine import moe_combine
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits, poisoned


def inputs(tokens: int, top_k: int, hidden: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    y = torch.randn(tokens, top_k, hidden, device=DEVICE).to(dtype)
    weights = torch.rand(tokens, top_k, device=DEVICE)
    return y, weights, torch.randn(tokens, hidden, device=DEVICE).to(dtype)


@given(
    tokens=st.integers(0, 5),
    top_k=st.integers(1, 9),
    hidden=st.sampled_from([1, 24, 96, 1024, 1025]),
    dtype=st.sampled_from(DTYPES),
    with_shared=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_combine_has_the_twins_bits(
    tokens: int, top_k: int, hidden: int, dtype: torch.dtype, with_shared: bool, seed: int
) -> None:
    y, weights, shared = inputs(tokens, top_k, hidden, dtype, seed)
    given_shared = shared if with_shared else None
    out = moe_combine(y, weights, given_shared)
    assert_same_bits(out, reference.moe_combine(y, weights, given_shared))
    truth = (y.double() * weights.double()[..., None]).sum(1) + (shared.double() if with_shared else 0.0)
    assert_close(out, truth, dtype)


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    y, weights, shared = inputs(6, 3, 40, torch.float16, 1)
    out = moe_combine(y, weights, shared)
    for t in range(6):
        assert_same_bits(moe_combine(y[t : t + 1], weights[t : t + 1], shared[t : t + 1])[0], out[t])


def test_gaps_between_rows_are_neither_read_nor_needed() -> None:
    y, weights, shared = inputs(4, 2, 24, torch.float32, 2)
    wide_y, wide_shared = poisoned(4, 3, 24, dtype=torch.float32), poisoned(4, 30, dtype=torch.float32)
    wide_y[:, :2], wide_shared[:, :24] = y, shared
    assert_same_bits(moe_combine(wide_y[:, :2], weights, wide_shared[:, :24]), moe_combine(y, weights, shared))


def test_nan_passes_through() -> None:
    y, weights, _ = inputs(2, 2, 8, torch.bfloat16, 3)
    y[1, 0, 3] = float("nan")
    assert moe_combine(y, weights).isnan().nonzero().tolist() == [[1, 3]]


def test_what_does_not_fit_is_refused() -> None:
    y, weights, shared = inputs(4, 2, 24, torch.float16, 4)
    with pytest.raises(KernelError, match=r"topk_weights is torch.float16; it must be torch.float32"):
        moe_combine(y, weights.half())
    with pytest.raises(KernelError, match=r"topk_weights has shape \(4, 1\); it must be \[4, 2\]"):
        moe_combine(y, weights[:, :1])
    with pytest.raises(KernelError, match=r"shared is torch.float32"):
        moe_combine(y, weights, shared.float())
    with pytest.raises(KernelError, match=r"y\[t\] must be contiguous"):
        moe_combine(y[..., ::2], weights)
    with pytest.raises(KernelError, match=r"y is torch.int64"):
        moe_combine(y.long(), weights)
