"""The twins that have no kernel in Triton: gpt-oss's activation, and biases of a product."""

from __future__ import annotations

import pytest
import torch

from duoserve import kernels
from duoserve.errors import KernelError
from duoserve.experts.layout import ExpertLayout
from tests.kernels.common import assert_close


def run_clamped(limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The op over three experts in permuted slots, and the same in float64."""
    torch.manual_seed(0)
    layout = ExpertLayout(torch.float32, 16, 6)
    pool = torch.full((4, layout.slot_bytes), 0xFF, dtype=torch.uint8)
    weights, bias_EN, x_TH = layout.weights(pool), torch.randn(3, 12), torch.randn(7, 16)
    slots = [2, 3, 0]
    for slot in slots:
        weights.w13_SNH[slot] = torch.randn(12, 16)
    ids_TK = torch.stack([torch.randperm(3)[:2] for _ in range(7)])
    plan = kernels.route_plan(ids_TK, torch.full((3,), -1, dtype=torch.int32))
    act_NI = torch.full((14, 6), float("nan"))
    truth_NI = torch.zeros(14, 6, dtype=torch.float64)
    for expert, slot in enumerate(slots):
        work = kernels.HostWork.of([(expert, slot)])
        kernels.moe_up_clamped(x_TH, weights, plan, work, bias_EN, 1.702, limit, act_NI)
        for row in range(*plan.rows(expert)):
            x_H = x_TH[plan.order_N[row] // 2].double()
            gate_I, up_I = (weights.w13_SNH[slot].double() @ x_H + bias_EN[expert].double()).view(6, 2).unbind(1)
            gate_I, up_I = gate_I.clamp(max=limit), up_I.clamp(-limit, limit)
            truth_NI[row] = (up_I + 1) * gate_I / (1 + (-1.702 * gate_I).exp())
    return act_NI, truth_NI


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_the_clamped_activation(limit: float) -> None:
    assert_close(*run_clamped(limit), torch.float32)


def test_without_a_kernel_in_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TRITON_ON_CPU", True)
    monkeypatch.setattr(kernels, "route_plan", kernels.reference.route_plan)
    with pytest.raises(KernelError, match="moe_up_clamped has no kernel in Triton yet, only one for CPUs"):
        run_clamped(7.0)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_with_a_bias(rows: int, dtype: torch.dtype) -> None:
    x, w, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 20), (9, 20), (9,)))
    assert_close(kernels.linear(x, w, bias), x.double() @ w.double().T + bias.double(), dtype)


def test_a_magnitude_scales_cosines_and_sines() -> None:
    frequencies_F = kernels.rope_frequencies(8, 100.0)
    plain, scaled = (kernels.rope_table(torch.arange(5), frequencies_F, torch.float32, m) for m in (1.0, 1.5))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one * 1.5, other)
