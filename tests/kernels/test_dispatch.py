"""The public names go where ``kernels/__init__`` sends them, and whole layers agree whatever computes them."""

from __future__ import annotations

import pytest
import torch

from duoserve import kernels
from duoserve.kernels import reference, triton_ops
from tests.kernels.common import DEVICE, assert_close, poisoned
from tests.kernels.experts_case import make_case


def test_a_cpu_computes_by_the_twins_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert kernels._ops(x) is reference
    monkeypatch.setattr(kernels, "_TRITON_ON_CPU", True)
    assert kernels._ops(x) is triton_ops


def test_a_layer_by_its_public_names_agrees_with_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(1, 2, 4, 64, 32, torch.float16, away=0.0)
    results = []
    for triton_on_cpu in (False, True):
        monkeypatch.setattr(kernels, "_TRITON_ON_CPU", triton_on_cpu)
        plan = kernels.route_plan(case.ids_TK, case.slots_E)
        act, y = case.act(), case.y()
        kernels.moe_up(case.x_TH, case.pool.weights, plan, plan.resident, act)
        kernels.moe_down(act, case.pool.weights, plan, plan.resident, y)
        slots = case.slots_E[case.ids_TK[0].long()]
        one_act, out = poisoned(2, 32, dtype=torch.float16), poisoned(1, 64, dtype=torch.float16)
        kernels.moe_gemv_up(case.x_TH, case.pool.weights, slots, one_act)
        kernels.moe_gemv_down(one_act, case.pool.weights, slots, torch.ones(1, 2, device=DEVICE), None, out)
        results.append((y, out))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs.double(), torch.float16, roundings=3)
    y, out = results[0]
    assert_close(out, y.double().sum(0, keepdim=True), torch.float16, roundings=3)
