"""The experts' grouped GEMMs and their twins against float64, and the table of their tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import DeviceWork, HostWork, RoutePlan, moe_checks, moe_gemm, reference
from duoserve.kernels.configs import (
    HUGE,
    INTERPRETER,
    LARGE,
    MEDIUM,
    SMALL,
    GemmConfig,
    gemm_config,
    shape_class,
)
from duoserve.kernels.machine import machine
from duoserve.kernels.weights import ExpertFormat
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits, assert_within_one_ulp
from tests.kernels.experts_case import FLOAT, FORMATS, TINY, Case, cases, layer, make_case
from tests.kernels.quantized_case import LAYOUTS

# Several groups and blocks (fp8: more than 128 gate rows), several tiles of rows, odd sizes, each format's own way.
LAYERS = (
    (FLOAT, torch.bfloat16, 40, 96, 11, False),
    (FLOAT, torch.float16, 17, 64, 96, True),
    ((ExpertFormat.INT8, 0), torch.bfloat16, 5, 144, 11, False),
    ((ExpertFormat.INT8, 0), torch.float32, 1, 40, 96, False),
    ((ExpertFormat.INT8, 0), torch.float16, 17, 48, 96, True),
    ((ExpertFormat.INT4, 32), torch.float16, 19, 64, 32, False),
    ((ExpertFormat.INT4, 32), torch.float16, 5, 96, 64, True),
    ((ExpertFormat.INT4, 64), torch.bfloat16, 5, 64, 128, False),
    ((ExpertFormat.INT4, 128), torch.float32, 1, 128, 128, False),
    ((ExpertFormat.FP8, 0), torch.bfloat16, 5, 40, 144, False),
    ((ExpertFormat.FP8, 0), torch.float16, 1, 144, 11, False),
    ((ExpertFormat.FP8, 0), torch.float16, 2, 144, 32, True),
    ((ExpertFormat.MXFP4, 0), torch.bfloat16, 5, 64, 96, False),
    ((ExpertFormat.MXFP4, 0), torch.float16, 19, 32, 64, True),
    ((ExpertFormat.BF12, 0), torch.bfloat16, 19, 40, 96, False),
    ((ExpertFormat.BF12, 0), torch.float16, 5, 144, 12, False),
    ((ExpertFormat.BF12, 0), torch.float32, 1, 40, 96, False),
)


def check_gemms(case: Case, config: GemmConfig | None) -> None:
    """Both GEMMs against float64; unused and unrouted rows and all slots stay as they are; two launches are one."""
    dtype, computed, count = case.x_TH.dtype, case.computed, len(case.computed)
    act, y = layer(case, config)
    assert_close(act[:count], case.true_act(), dtype)
    assert bool(act[count:].isnan().all()), "rows of no expert were written"
    assert_close(y[computed], case.true_y(act), dtype)
    unused = torch.ones(len(y), dtype=torch.bool, device=DEVICE).index_fill_(0, computed, False)
    assert bool(y[unused].isnan().all()), "rows of no expert were written"

    in_two_launches = layer(case, config, [case.plan.resident.pairs(), case.arrived.pairs()])
    assert_same_bits(in_two_launches[0], act)
    assert_same_bits(in_two_launches[1], y)
    case.pool.check()


def tma_fits(case: Case) -> bool:
    return moe_checks.tma_fits(case.pool.weights.w13_SNH) and moe_checks.tma_fits(case.pool.weights.w2_SHI)


@given(case=cases(st.sampled_from(DTYPES)), tiny=st.booleans(), tma=st.booleans())
@settings(max_examples=25, deadline=None)
def test_both_gemms_against_float64(case: Case, tiny: bool, tma: bool) -> None:
    check_gemms(case, case.tiny(tma and tma_fits(case)) if tiny else None)


@pytest.mark.parametrize("form", LAYOUTS)
@given(data=st.data(), tiny=st.booleans(), tma=st.booleans())
@settings(max_examples=4, deadline=None)
def test_both_gemms_on_quantized_weights(
    form: tuple[ExpertFormat, int], data: st.DataObject, tiny: bool, tma: bool
) -> None:
    case = data.draw(cases(st.sampled_from(DTYPES), form, tokens=(1, 2, 7, 17)))
    check_gemms(case, case.tiny(tma and tma_fits(case)) if tiny else None)


@pytest.mark.parametrize(("form", "dtype", "tokens", "hidden", "inter", "tma"), LAYERS)
def test_layers_that_have_many_tiles_groups_and_blocks(
    form: tuple[ExpertFormat, int], dtype: torch.dtype, tokens: int, hidden: int, inter: int, tma: bool
) -> None:
    """With the table's own row; beside the kernels also the twins."""
    case = make_case(tokens, 2, 3, hidden, inter, dtype, form)
    check_gemms(case, replace(gemm_config(dtype, INTERPRETER, SMALL, True, *form), tma=tma))
    check_twins(case)


def check_twins(case: Case) -> None:
    act, y = case.act(), case.y()
    for work in (case.plan.resident, case.arrived):
        reference.moe_up(case.x_TH, case.pool.weights, case.plan, work, act)
        reference.moe_down(act, case.pool.weights, case.plan, work, y)
    # Gate and up, the silu of one and its product with the other are each rounded; where one element is most of the
    # norm, they do not cancel.
    assert_close(act[: len(case.computed)], case.true_act(), case.x_TH.dtype, roundings=4)
    assert_close(y[case.computed], case.true_y(act), case.x_TH.dtype)
    assert bool(act[len(case.computed) :].isnan().all())


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_the_twins_against_float64(form: tuple[ExpertFormat, int], data: st.DataObject) -> None:
    check_twins(data.draw(cases(st.sampled_from(DTYPES), form)))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_but_one_in_a_thousand_are_within_one_ulp(form: tuple[ExpertFormat, int], dtype: torch.dtype) -> None:
    case = make_case(16, 2, 2, 128, 128, dtype, form)
    act, y = layer(case)
    assert_within_one_ulp(act, case.true_act())
    assert_within_one_ulp(y[case.computed], case.true_y(act))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_class_gives_a_row_the_same_bits(dtype: torch.dtype, form: tuple[ExpertFormat, int]) -> None:
    """What makes the whole table batch-invariant. The interpreter's products promise no such thing."""
    case = make_case(300, 2, 4, 512, 384, dtype, form, away=0.0)
    arch, _ = machine(case.x_TH.device)
    configs = [gemm_config(dtype, arch, block_t, True, *form) for block_t in (SMALL, MEDIUM, LARGE, HUGE)]
    first_act, first_y = layer(case, configs[0])
    for config in configs[1:]:
        act, y = layer(case, config)
        assert_same_bits(act, first_act)
        assert_same_bits(y, first_y)


def test_an_expert_without_a_slot_is_not_silent() -> None:
    case = make_case(5, 1, 2, 32, 32, torch.float32, away=1.0)
    for slot in (-1, len(case.pool.rows_SB)):
        act = torch.zeros_like(case.act())
        moe_gemm.moe_up(
            case.x_TH,
            case.pool.weights,
            case.plan,
            HostWork.of([(expert, slot) for expert, _ in case.plan.missing.pairs()], DEVICE),
            act,
        )
        assert bool(act.isnan().all())


def test_nothing_to_do_touches_nothing() -> None:
    case = make_case(3, 1, 2, 32, 32, torch.float32, away=0.0)
    assert all(bool(result.isnan().all()) for result in layer(case, None, [case.plan.missing.pairs(), []]))


def test_shape_classes() -> None:
    assert shape_class(1, 8, 128) == shape_class(16, 2, 2) == shape_class(128, 8, 128) == SMALL
    assert shape_class(512, 8, 128) == MEDIUM
    assert shape_class(2048, 8, 128) == LARGE
    assert shape_class(8192, 2, 8) == HUGE
    for arch in (80, 86, 89, 90, 100, 120):
        for dtype in DTYPES:
            configs = [gemm_config(dtype, arch, block_t) for block_t in (SMALL, MEDIUM, LARGE, HUGE)]
            assert all(config.block_n >= 64 and config.block_t >= 16 and config.reason for config in configs)
    assert not gemm_config(torch.bfloat16, 90, SMALL, tma_fits=False).tma


def test_wrong_operands_are_refused() -> None:
    case = make_case(3, 2, 4, 32, 32, torch.float16, away=0.0)
    x, weights, plan, work, act = case.x_TH, case.pool.weights, case.plan, case.all_work, case.act()
    narrow = replace(weights, w13_SNH=weights.w13_SNH[:, :, ::2])
    short: RoutePlan = replace(plan, order_R=plan.order_R[:-2])
    for message, operands in {
        "x_TH is torch.float32": (x.float(), weights, plan, work, act),
        "x_TH has shape": (x[:2], weights, plan, work, act),
        "contiguous": (x.repeat(1, 2)[:, ::2], weights, plan, work, act),
        "act_RI is": (x, weights, plan, work, act.float()),
        "act_RI has shape": (x, weights, plan, work, act[:, :16].contiguous()),
        "w2_SHI has shape": (x, narrow, plan, work, act),
        "has shape": (x, weights, short, work, act),
        "slots_W is": (x, weights, plan, DeviceWork(work.experts_W, work.slots_W.long(), work.count_1), act),
        "one device": (x.to("meta"), weights, plan, work, act),
    }.items():
        with pytest.raises(KernelError, match=message):
            moe_gemm.moe_up(*operands)
    with pytest.raises(KernelError, match="multiples of 16 bytes"):
        odd = make_case(3, 2, 4, 32, 11, torch.float16, away=0.0)
        layer(odd, replace(TINY, tma=True))
