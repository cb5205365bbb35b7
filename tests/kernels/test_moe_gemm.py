"""The experts' grouped GEMMs: against float64, and the bits that no placement, split or batch may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import RoutePlan, Work, moe_checks, moe_gemm, reference
from duoserve.kernels.configs import HUGE, LARGE, MEDIUM, SMALL, GemmConfig, gemm_config, shape_class, takes_gemv
from duoserve.kernels.weights import ExpertFormat
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits
from tests.kernels.experts_case import Case, cases, make_case

TINY = GemmConfig(32, 16, 32, 4, 2, 1, "many tiles of small matrices", group_t=2)


def up(case: Case, works: list[Work], config: GemmConfig | None = None) -> torch.Tensor:
    act = case.act()
    for work in works:
        moe_gemm.moe_up(case.x_TH, case.pool.weights, case.plan, work, act, config)
    return act


def down(case: Case, act: torch.Tensor, works: list[Work], config: GemmConfig | None = None) -> torch.Tensor:
    y = case.y()
    for work in works:
        moe_gemm.moe_down(act, case.pool.weights, case.plan, work, y, config)
    return y


@given(case=cases(st.sampled_from(DTYPES)), tiny=st.booleans(), tma=st.booleans())
@settings(max_examples=25, deadline=None)
def test_both_gemms_against_float64(case: Case, tiny: bool, tma: bool) -> None:
    """Also in two launches, with unused rows, untouched rows, canary slots and the twin."""
    weights = case.pool.weights
    tma = tma and moe_checks.tma_fits(weights.w13_SNH) and moe_checks.tma_fits(weights.w2_SHI)
    config = replace(TINY, tma=tma) if tiny else None
    dtype, computed, count = case.x_TH.dtype, case.computed, len(case.computed)
    act = up(case, [case.all_work], config)
    assert_close(act[:count], case.true_act(), dtype)
    assert bool(act[count:].isnan().all()), "rows of no expert were written"
    y = down(case, act, [case.all_work], config)
    assert_close(y[computed], case.true_y(act), dtype)
    unused = torch.ones(len(y), dtype=torch.bool, device=DEVICE).index_fill_(0, computed, False)
    assert bool(y[unused].isnan().all()), "rows of no expert were written"

    two_launches = [case.plan.resident, case.arrived]
    assert_same_bits(up(case, two_launches, config), act)
    assert_same_bits(down(case, act, two_launches, config), y)
    case.pool.check()


@given(case=cases(st.sampled_from(DTYPES)))
@settings(max_examples=25, deadline=None)
def test_the_twins_against_float64(case: Case) -> None:
    act, y = case.act(), case.y()
    for work in (case.plan.resident, case.arrived):
        reference.moe_up(case.x_TH, case.pool.weights, case.plan, work, act)
        reference.moe_down(act, case.pool.weights, case.plan, work, y)
    # The product, its silu and their product are each rounded.
    assert_close(act[: len(case.computed)], case.true_act(), case.x_TH.dtype, roundings=2)
    assert_close(y[case.computed], case.true_y(act), case.x_TH.dtype)
    assert bool(act[len(case.computed) :].isnan().all())


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype, tma: bool) -> None:
    case = make_case(21, 2, 3, 64, 48, dtype, away=0.0)
    config = replace(TINY, tma=tma)
    act = up(case, [case.all_work], config)
    y = down(case, act, [case.all_work], config).view(21, 2, -1)
    for token in (0, 13, 20):
        ids = case.ids_TK[token : token + 1]
        alone = replace(
            case, x_TH=case.x_TH[token : token + 1], ids_TK=ids, plan=reference.route_plan(ids, case.slots_E)
        )
        its_act = up(alone, [alone.all_work], config)
        assert_same_bits(down(alone, its_act, [alone.all_work], config), y[token])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_class_gives_a_row_the_same_bits(dtype: torch.dtype) -> None:
    """What makes the whole table batch-invariant. The interpreter's products promise no such thing."""
    case = make_case(300, 2, 4, 512, 384, dtype, away=0.0)
    arch, _ = moe_gemm.machine(case.x_TH.device)
    configs = [gemm_config(dtype, arch, block_t) for block_t in (SMALL, MEDIUM, LARGE, HUGE)]
    acts = [up(case, [case.all_work], config) for config in configs]
    ys = [down(case, acts[0], [case.all_work], config) for config in configs]
    for act, y in zip(acts[1:], ys[1:], strict=True):
        assert_same_bits(act, acts[0])
        assert_same_bits(y, ys[0])


def test_neither_slots_nor_tile_order_nor_descriptors_change_bits() -> None:
    case, moved = (make_case(50, 2, 4, 96, 64, torch.float16, away=0.0) for _ in range(2))
    moved.slots_E = case.slots_E.roll(1)
    for expert, slot in enumerate(moved.slots_E.tolist()):
        moved.pool.put(slot, case.w13_ENH[expert], case.w2_EHI[expert])
    act = up(case, [case.all_work], TINY)
    for config in (TINY, replace(TINY, group_t=1), replace(TINY, tma=True), replace(TINY, ctas_per_sm=100)):
        assert_same_bits(up(moved, [moved.all_work], config), act)


def test_an_expert_without_a_slot_is_not_silent() -> None:
    case = make_case(5, 1, 2, 32, 32, torch.float32, away=1.0)
    for slot in (-1, len(case.pool.rows_SB)):
        act = torch.zeros_like(case.act())
        moe_gemm.moe_up(
            case.x_TH,
            case.pool.weights,
            case.plan,
            Work.of([(expert, slot) for expert, _ in case.plan.missing.pairs()], DEVICE),
            act,
        )
        assert bool(act.isnan().all())


def test_nothing_to_do_touches_nothing() -> None:
    case = make_case(3, 1, 2, 32, 32, torch.float32, away=0.0)
    assert bool(up(case, [case.plan.missing, Work.of([], DEVICE)]).isnan().all())


def test_only_a_token_alone_takes_the_matrix_vector_kernels() -> None:
    assert takes_gemv(1, ExpertFormat.FLOAT, invariant=False)
    assert not takes_gemv(2, ExpertFormat.FLOAT, invariant=False)
    assert not takes_gemv(1, ExpertFormat.INT4, invariant=False)
    assert not takes_gemv(1, ExpertFormat.FLOAT, invariant=True)


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
    short: RoutePlan = replace(plan, order_N=plan.order_N[:-2])
    for message, operands in {
        "x_TH is torch.float32": (x.float(), weights, plan, work, act),
        "x_TH has shape": (x[:2], weights, plan, work, act),
        "contiguous": (x.repeat(1, 2)[:, ::2], weights, plan, work, act),
        "act_RI is": (x, weights, plan, work, act.float()),
        "act_RI has shape": (x, weights, plan, work, act[:, :16].contiguous()),
        "w2_SHI has shape": (x, narrow, plan, work, act),
        "has shape": (x, weights, short, work, act),
        "slots_W is": (x, weights, plan, replace(work, slots_W=work.slots_W.long()), act),
        "one device": (x.to("meta"), weights, plan, work, act),
    }.items():
        with pytest.raises(KernelError, match=message):
            moe_gemm.moe_up(*operands)
    with pytest.raises(KernelError, match="multiples of 16 bytes"):
        odd = make_case(3, 2, 4, 32, 11, torch.float16, away=0.0)
        down(odd, odd.act(), [odd.all_work], replace(TINY, tma=True))
