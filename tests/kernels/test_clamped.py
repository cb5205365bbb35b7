"""gpt-oss's activation in PyTorch and in Triton, and biases of a product."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from duoserve import kernels
from duoserve.errors import KernelError
from duoserve.kernels import ClampedUp, moe_fill, moe_gemm, reference
from duoserve.kernels.configs import SMALL
from duoserve.kernels.weights import ExpertFormat
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits
from tests.kernels.experts_case import FLOAT, Case, make_case
from tests.kernels.host_case import Away

MXFP4 = (ExpertFormat.MXFP4, 32)
LIMITS = (0.5, 1.5)


def clamped_up(case: Case, limit: float) -> ClampedUp:
    """A bias as large as the products."""
    generator = torch.Generator().manual_seed(3)
    shape = len(case.slots_E), case.w13_ENH.shape[1]
    return ClampedUp(torch.randn(shape, generator=generator).to(DEVICE, case.x_TH.dtype), 1.702, limit)


def truth(case: Case, clamped: ClampedUp) -> Tensor:
    """float64 [R', I] of the computed rows, in sorted order."""
    experts = case.ids_TK.flatten()[case.computed].long()
    x = case.x_TH.double()[case.computed // case.plan.top_k]
    up_RN = torch.einsum("rnh,rh->rn", case.w13_ENH.double()[experts], x) + clamped.bias_EN.double()[experts]
    gate_RI, up_RI = up_RN[:, 0::2].clamp(max=clamped.limit), up_RN[:, 1::2].clamp(-clamped.limit, clamped.limit)
    return (up_RI + 1) * gate_RI / (1 + (-clamped.alpha * gate_RI).exp())


def activations(case: Case, clamped: ClampedUp, ops: ModuleType = moe_gemm, **options: object) -> Tensor:
    act_RI = case.act()
    ops.moe_up(case.x_TH, case.pool.weights, case.plan, case.all_work, act_RI, clamped, **options)
    case.pool.check()
    return act_RI


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("form", [FLOAT, MXFP4], ids=["float", "mxfp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ops", "roundings"), [(reference, 6), (moe_gemm, 1)], ids=["pytorch", "triton"])
def test_the_clamped_activation(
    ops: ModuleType, roundings: int, dtype: torch.dtype, form: tuple[ExpertFormat, int], limit: float
) -> None:
    """Of an odd number of features in whole and cut tiles, some rows of no expert; PyTorch rounds after each step."""
    case = make_case(9, 2, 4, 96, 64 if form == MXFP4 else 41, dtype, form, padding=True)
    clamped = clamped_up(case, limit)
    act_RI, true_RI = activations(case, clamped, ops), truth(case, clamped)
    assert_close(act_RI[: len(true_RI)], true_RI, dtype, roundings)
    assert act_RI[len(true_RI) :].isnan().all()
    plain_RI = activations(case, clamped._replace(limit=6e4), ops)[: len(true_RI)]
    assert not torch.equal(plain_RI, act_RI[: len(true_RI)])  # so the limit was met


@pytest.mark.parametrize("form", [FLOAT, MXFP4], ids=["float", "mxfp4"])
def test_reading_through_gives_the_same_bits(form: tuple[ExpertFormat, int]) -> None:
    case = make_case(5, 2, 6, 64, 32, torch.bfloat16, form, away=0.8)
    clamped, weights = clamped_up(case, 0.5), case.pool.weights
    config = moe_fill.fill_config(torch.bfloat16, 0, SMALL, weights.format, weights.group)
    resident_RI = activations(case, clamped, config=config)
    away, act_RI = Away(case), case.act()
    assert away.work.pairs()
    moe_gemm.moe_up(case.x_TH, weights, case.plan, case.plan.resident, act_RI, clamped, config)
    moe_fill.moe_up_fill(case.x_TH, weights, away.source, case.plan, away.work, act_RI, clamped)
    assert_same_bits(act_RI, resident_RI)


@pytest.mark.parametrize("ops", [reference, moe_gemm], ids=["pytorch", "triton"])
def test_what_is_no_number_is_not_cut_off(ops: ModuleType) -> None:
    case = make_case(3, 2, 4, 64, 32, torch.float32)
    case.x_TH[1] = float("nan")
    act_RI = activations(case, clamped_up(case, 7.0), ops)
    tokens_R = case.plan.order_R.long() // 2
    assert act_RI[tokens_R == 1].isnan().all() and act_RI[tokens_R != 1].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 64), (4, 62)])
def test_a_bias_of_other_experts_is_refused(shape: tuple[int, int]) -> None:
    case = make_case(3, 2, 4, 64, 32, torch.float32)
    wrong = ClampedUp(torch.zeros(shape, device=DEVICE), 1.702, 7.0)
    with pytest.raises(KernelError, match=r"bias_EN .*4, 64"):
        activations(case, wrong)


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
