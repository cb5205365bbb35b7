"""The public names go where ``kernels/__init__`` sends them, and whole layers agree whatever computes them."""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import Parameter, signature
from pathlib import Path

import pytest
import torch

from duoserve import MoEModel, SamplingParams, kernels
from duoserve.kernels import triton_ops
from tests.kernels.common import DEVICE, INTERPRETED, assert_close, poisoned
from tests.kernels.experts_case import make_case


def test_a_cpu_computes_by_the_twins_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    y_TKH, weights_TK = torch.ones(1, 1, 4), torch.full((1, 1), 2.0)
    monkeypatch.setattr(triton_ops, "moe_combine", lambda *_: "by triton")
    monkeypatch.setattr(kernels, "_TRITON_ON_CPU", False)
    assert torch.equal(kernels.moe_combine(y_TKH, weights_TK), torch.full((1, 4), 2.0))
    monkeypatch.setattr(kernels, "_TRITON_ON_CPU", True)
    assert kernels.moe_combine(y_TKH, weights_TK) == "by triton"


def test_without_triton_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from duoserve import KernelError, kernels
try:
    kernels.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)
except KernelError as error:
    print(error)
"""
    environment = os.environ | {"DUOSERVE_KERNELS": "triton"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "this takes Triton, which is not installed: pip install 'duoserve[triton]'\n"


@pytest.mark.parametrize("name", triton_ops.__all__)
def test_an_op_in_triton_has_its_twin_s_signature(name: str) -> None:
    """It may have more parameters that are optional."""
    twin, kernel = getattr(kernels, name).__wrapped__, getattr(triton_ops, name)
    ours, theirs = (
        [(parameter.name, parameter.default) for parameter in signature(op).parameters.values()]
        for op in (kernel, twin)
    )
    assert ours[: len(theirs)] == theirs
    assert all(default is not Parameter.empty for _, default in ours[len(theirs) :])


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


@INTERPRETED
def test_bard_writes_the_same_by_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A whole model, from prompt to text, in the interpreter: the tokens of the CPU path in float32.

    The second decode step reads what the first has written.
    """
    params = SamplingParams(max_tokens=3, temperature=0.0)
    written = []
    for triton_on_cpu in (False, True):
        monkeypatch.setattr(kernels, "_TRITON_ON_CPU", triton_on_cpu)
        with MoEModel.from_pretrained(
            "bard", device="cpu", dtype="float32", expert_slots="25%", cache_dir=tmp_path
        ) as model:
            written.append(model.generate("To be", params).token_ids)
    assert written[0] == written[1]
    assert len(written[0]) == 3
