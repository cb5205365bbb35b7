"""The reference ops against float64 formulas written out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve import kernels
from duoserve.experts.layout import ExpertLayout
from duoserve.kernels import matmul
from tests.kernels.common import DTYPES, TOLERANCE, assert_close

dtypes = st.sampled_from(DTYPES)


@given(rows=st.integers(1, 40), k=st.integers(1, 96), n=st.integers(1, 80), dtype=dtypes, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_linear(rows: int, k: int, n: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    out = kernels.linear(x, w)
    assert out.dtype == dtype
    assert_close(out, x.double() @ w.double().T, dtype)


def test_linear_widens_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "WIDEN_ELEMENTS", 64)
    monkeypatch.setattr(matmul, "has_native_matmul", lambda dtype: False)
    x, w = torch.randn(9, 20).bfloat16(), torch.randn(31, 20).bfloat16()
    assert_close(kernels.linear(x, w), x.double() @ w.double().T, torch.bfloat16)


def layer_of_experts(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token and expert by expert in float64: the output, and the squares of the terms of its sums."""
    truth, terms = torch.zeros(2, *x.shape, dtype=torch.float64)
    for t, (weights, experts) in enumerate(zip(topk_weights.double(), topk_ids, strict=True)):
        for weight, e in zip(weights, experts, strict=True):
            up = w13[e].double() @ x[t].double()
            act = torch.nn.functional.silu(up[0::2]) * up[1::2]
            truth[t] += weight * (w2[e].double() @ act)
            terms[t] += weight**2 * (w2[e].double() ** 2 @ act**2)
    return truth, terms


@given(
    tokens=st.integers(1, 30),
    experts=st.integers(1, 12),
    data=st.data(),
    dtype=dtypes,
    hidden=st.sampled_from([8, 24]),
    inter=st.sampled_from([7, 8, 11, 96]),
)
@settings(max_examples=60, deadline=None)
def test_a_layer_of_experts(
    tokens: int, experts: int, data: st.DataObject, dtype: torch.dtype, hidden: int, inter: int
) -> None:
    """Slots permuted and poisoned, experts computed in any order."""
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layout = ExpertLayout(dtype, hidden, inter)
    pool = torch.full((experts + 2, layout.slot_bytes), 0xFF, dtype=torch.uint8)
    slots = data.draw(st.permutations(range(experts + 2)))[:experts]
    w13, w2 = torch.randn(experts, 2 * inter, hidden).to(dtype), torch.randn(experts, hidden, inter).to(dtype)
    weights = layout.weights(pool)
    for expert, slot in enumerate(slots):
        weights.w13_SNH[slot], weights.w2_SHI[slot] = w13[expert], w2[expert]
    x = torch.randn(tokens, hidden).to(dtype)
    topk_weights, topk_ids = kernels.router_topk(torch.randn(tokens, experts), top_k)

    plan = kernels.route_plan(topk_ids, torch.full((experts,), -1, dtype=torch.int32))
    act = torch.full((tokens * top_k, inter), float("nan"), dtype=dtype)
    y = torch.full((tokens * top_k, hidden), float("nan"), dtype=dtype)
    for expert in data.draw(st.permutations([*plan.num_rows()])):
        work = kernels.HostWork.of([(expert, slots[expert])])
        kernels.moe_up(x, weights, plan, work, act)
        kernels.moe_down(act, weights, plan, work, y)
    out = kernels.moe_combine(y.view(tokens, top_k, hidden), topk_weights)

    truth, terms = layer_of_experts(x, w13, w2, topk_weights, topk_ids)
    assert out.dtype == dtype
    # Three roundings to the dtype lie on the way (up, activation, down) beside the result's own. They are as large as
    # the terms of the sum, which may cancel out: without that, their squares add up to the result's.
    assert ((out.double() - truth).norm() / terms.sum().sqrt()) <= 3 * TOLERANCE[dtype]


@given(
    new=st.integers(1, 20),
    past=st.integers(0, 20),
    groups=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.one_of(st.none(), st.integers(1, 30)),
)
@settings(max_examples=80, deadline=None)
def test_attention(new: int, past: int, groups: tuple[int, int], window: int | None) -> None:
    heads, kv_heads = groups
    torch.manual_seed(new * 31 + past)
    q = torch.randn(new, heads, 16)
    k, v = torch.randn(new + past, kv_heads, 16), torch.randn(new + past, kv_heads, 16)
    out = kernels.attention(q, k, v, 0.25, window)
    truth = torch.zeros(new, heads, 16, dtype=torch.float64)
    for t in range(new):
        stop = past + t + 1
        start = 0 if window is None else max(0, stop - window)
        for h in range(heads):
            g = h * kv_heads // heads
            scores = (k[start:stop, g].double() @ q[t, h].double()) * 0.25
            truth[t, h] = scores.softmax(0) @ v[start:stop, g].double()
    assert_close(out, truth, torch.float32)


def test_rope_rotates_each_pair_by_its_angle() -> None:
    positions = torch.tensor([0, 1, 5, 1000])
    x = torch.randn(4, 3, 8)
    out = kernels.apply_rope(x, *kernels.rope_table(positions, kernels.rope_frequencies(8, 100.0), torch.float32))
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = torch.tensor(position / 100.0 ** (2 * i / 8), dtype=torch.float64)
            turn = torch.polar(torch.tensor(1.0, dtype=torch.float64), angle)
            z = torch.complex(x[t, :, i].double(), x[t, :, i + 4].double()) * turn
            torch.testing.assert_close(out[t, :, i].double(), z.real, atol=2e-4, rtol=0)
            torch.testing.assert_close(out[t, :, i + 4].double(), z.imag, atol=2e-4, rtol=0)


@given(dtype=dtypes, width=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_rms_norm(dtype: torch.dtype, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    truth = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert ((kernels.rms_norm(x, weight, 1e-5).double() - truth).norm() / truth.norm()) <= 2 * TOLERANCE[dtype]


def test_router_weights_are_a_renormalized_softmax() -> None:
    logits = torch.randn(50, 8).bfloat16()
    weights, ids = kernels.router_topk(logits, 3)
    probs = logits.double().softmax(-1).gather(1, ids)
    torch.testing.assert_close(weights.double(), probs / probs.sum(-1, keepdim=True), atol=1e-6, rtol=0)
    assert (weights.diff() <= 0).all()
