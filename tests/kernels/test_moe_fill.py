"""Read-through fill: the bits of the resident computation, and slots filled byte for byte."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import HostWork, Work, moe_fill, moe_gemm, reference, reference_copies
from duoserve.kernels.configs import GemmConfig, shape_class
from duoserve.kernels.host_rows import HostRows, offset_in_row
from duoserve.kernels.machine import machine
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat
from tests.kernels.common import DEVICE, DTYPES, POISON, assert_same_bits
from tests.kernels.experts_case import FLOAT, FORMATS, Case, cases, layer, make_case
from tests.kernels.host_case import Away
from tests.kernels.quantized_case import LAYOUTS


def config_of(case: Case) -> GemmConfig:
    """The fill's tiles on this machine: products have other bits in other tiles."""
    weights = case.pool.weights
    arch, _ = machine(case.x_TH.device)
    block_t = shape_class(len(case.x_TH), case.plan.top_k, len(case.slots_E))
    return moe_fill.fill_config(case.x_TH.dtype, arch, block_t, weights.format, weights.group)


def filled(
    case: Case, away: Away, works: list[Work], fills: ModuleType = moe_fill, gemms: ModuleType = moe_gemm
) -> tuple[torch.Tensor, torch.Tensor]:
    """(act, y) of the resident experts by ``gemms`` and of those in ``works`` by ``fills``, a launch for each."""
    act, y, weights, plan = case.act(), case.y(), case.pool.weights, case.plan
    config = {"config": config_of(case)} if gemms is moe_gemm else {}
    gemms.moe_up(case.x_TH, weights, plan, plan.resident, act, **config)
    for work in works:
        fills.moe_up_fill(case.x_TH, weights, away.source, plan, work, act)
    gemms.moe_down(act, weights, plan, plan.resident, y, **config)
    for work in works:
        fills.moe_down_fill(act, weights, away.source, plan, work, y)
    return act, y


def check_fill(case: Case) -> None:
    """In one launch, and expert by expert from the last; nothing but the parts of the experts changes in the pool."""
    act, y = layer(case, config_of(case))
    for one_by_one in (False, True):
        away = Away(case)
        works = [HostWork.of([pair], DEVICE) for pair in reversed(away.work.pairs())] if one_by_one else [away.work]
        ours = filled(case, away, works)
        assert_same_bits(ours[0], act)
        assert_same_bits(ours[1], y)
        assert torch.equal(case.pool.rows_SB, away.full_SB)


@given(case=cases(st.sampled_from(DTYPES)))
@settings(max_examples=8, deadline=None)
def test_fill_gives_the_resident_bits_and_fills_the_slots(case: Case) -> None:
    check_fill(case)


@pytest.mark.parametrize("form", LAYOUTS)
@given(data=st.data())
@settings(max_examples=2, deadline=None)
def test_fill_of_quantized_experts(form: tuple[ExpertFormat, int], data: st.DataObject) -> None:
    check_fill(data.draw(cases(st.sampled_from(DTYPES), form, tokens=(1, 7, 17))))


@triton.jit
def fill_one_tile_kernel(
    address_1,
    w,
    scales,
    zeros,
    w_from,
    scales_from,
    zeros_from,
    slot,
    slot_stride,
    scales_stride,
    zeros_stride,
    first_n,
    N,
    D,
    UP: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
):
    address = tl.load(address_1)
    moe_fill._fill_tile(
        address, w, scales, zeros, w_from, scales_from, zeros_from, slot, slot_stride, scales_stride, zeros_stride,
        first_n, N, D, UP, FORMAT, GROUP, BN, 512,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_a_tile_brings_all_that_its_product_reads(form: tuple[ExpertFormat, int]) -> None:
    """A race that the interpreter would not see: a CTA that needs what another brings.

    1056 columns have more groups of 32 than are copied at a time.
    """
    hidden, inter = (160, 160) if form[0] in (ExpertFormat.FP8, ExpertFormat.INT8) else (128, 128)
    hidden = 1056 if form == (ExpertFormat.INT4, 32) else hidden
    case = make_case(1, 1, 1, hidden, inter, torch.float16, form, away=1.0)
    slot, weights = int(case.slots_E[0]), case.pool.weights
    source = Away(case).source
    for matrix, truth_ND in ((weights.w13, case.w13_ENH[0]), (weights.w2, case.w2_EHI[0])):
        offsets = [offset_in_row(part, weights) for part in matrix.parts] + [0, 0]
        parts, strides = matrix.parts + [matrix.data_SNB] * 2, [part.stride(0) for part in matrix.parts] + [0, 0]
        for first_n in range(0, len(truth_ND), 64):
            case.pool.rows_SB[slot] = POISON
            fill_one_tile_kernel[(1,)](
                source.addresses_E, *parts[:3], *offsets[:3], slot, *strides[:3], first_n, len(truth_ND), matrix.inner,
                matrix.interleaved, matrix.format.value, matrix.group, 64,
            )  # fmt: skip
            assert torch.equal(dense(matrix, slot)[first_n : first_n + 64], truth_ND[first_n : first_n + 64])


# More than one tile of weights in a block of scales, more than one block or several groups.
@pytest.mark.parametrize(
    ("form", "hidden", "inter"),
    [
        (FLOAT, 40, 96),
        ((ExpertFormat.INT8, 0), 136, 72),
        ((ExpertFormat.INT4, 32), 96, 64),
        ((ExpertFormat.FP8, 0), 144, 144),
        ((ExpertFormat.MXFP4, 0), 96, 96),
        ((ExpertFormat.BF12, 0), 136, 72),
    ],
)
def test_fill_of_many_tiles_groups_and_blocks(form: tuple[ExpertFormat, int], hidden: int, inter: int) -> None:
    check_fill(make_case(2, 2, 2, hidden, inter, torch.float16, form, away=1.0))


def test_an_expert_may_have_more_rows_than_a_tile() -> None:
    """As when one token names it twice."""
    case = make_case(16, 2, 2, 32, 32, torch.float16, skew="twice", away=1.0)
    case.ids_TK[:] = 0
    case.plan = reference.route_plan(case.ids_TK, torch.full_like(case.slots_E, -1))
    assert case.plan.rows(0) == (0, 32) and config_of(case).block_t == 16
    check_fill(case)


@pytest.mark.parametrize("form", FORMATS)
def test_the_twins_fill_and_compute_the_same(form: tuple[ExpertFormat, int]) -> None:
    hidden, inter = (144, 32) if form[0] is ExpertFormat.FP8 else (128, 128)
    case = make_case(5, 2, 3, hidden, inter, torch.float32, form, away=0.7)
    act, y = case.act(), case.y()
    reference.moe_up(case.x_TH, case.pool.weights, case.plan, case.all_work, act)
    reference.moe_down(act, case.pool.weights, case.plan, case.all_work, y)
    away = Away(case)
    assert away.work.pairs()
    ours = filled(case, away, [away.work], reference_copies, reference)
    assert_same_bits(ours[0], act)
    assert_same_bits(ours[1], y)
    assert torch.equal(case.pool.rows_SB, away.full_SB)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype) -> None:
    case = make_case(7, 2, 3, 64, 48, dtype, away=1.0)
    away = Away(case)
    y = filled(case, away, [away.work])[1].view(7, 2, -1)
    for token in (0, 6):
        alone = case.alone(token)
        alone.plan = reference.route_plan(alone.ids_TK, torch.full_like(case.slots_E, -1))
        assert_same_bits(filled(alone, away, [alone.arrived])[1], y[token])


@pytest.mark.parametrize("fills", [moe_fill, reference_copies])
def test_an_expert_without_row_or_slot_is_not_silent(fills: ModuleType) -> None:
    case = make_case(3, 1, 2, 32, 32, torch.float32, away=1.0)
    away, weights, plan = Away(case), case.pool.weights, case.plan
    before = case.pool.rows_SB.clone()
    nowhere = HostRows.of([None, None], DEVICE)
    for source, slot in ((nowhere, 0), (away.source, -1), (away.source, 99)):
        act, y = torch.zeros_like(case.act()), torch.zeros_like(case.y())
        work = HostWork.of([(expert, slot) for expert, _ in away.work.pairs()], DEVICE)
        fills.moe_up_fill(case.x_TH, weights, source, plan, work, act)
        fills.moe_down_fill(torch.zeros_like(act), weights, source, plan, work, y)
        assert bool(act.isnan().all()) and bool(y.isnan().all())
    assert torch.equal(case.pool.rows_SB, before)


def test_an_expert_without_rows_is_brought_and_nothing_is_computed() -> None:
    case = make_case(2, 1, 3, 32, 32, torch.float16, skew="repeated", away=1.0)
    unused = next(expert for expert in range(3) if case.plan.rows(expert)[0] == case.plan.rows(expert)[1])
    case.plan = replace(case.plan, missing=HostWork.of([(unused, -1)], DEVICE))
    away = Away(case)
    ours = filled(case, away, [away.work])
    assert all(bool(result.isnan().all()) for result in ours)
    assert torch.equal(case.pool.rows_SB, away.full_SB)


def test_wrong_operands_are_refused() -> None:
    case = make_case(3, 1, 2, 32, 32, torch.float32, away=1.0)
    source, weights = Away(case).source, case.pool.weights
    apart = replace(weights, w2_SHI=weights.w2_SHI.clone())
    w2 = weights.w2_SHI
    uneven = replace(weights, w2_SHI=w2.as_strided(w2.shape, w2.stride(), w2.storage_offset() - 1))
    short = HostRows.of([row_B[:8192] for row_B in source.rows_E if row_B is not None][:1] * 2, DEVICE)
    for message, operands in {
        "addresses_E is torch.int32": (weights, replace(source, addresses_E=source.addresses_E.int())),
        r"addresses_E has shape \(1,\)": (weights, HostRows.of([None], DEVICE)),
        "not views of one pool": (apart, source),
        "begins at byte 8188": (uneven, source),
        "rows have 8192 bytes; the experts need 12288": (weights, short),
    }.items():
        with pytest.raises(KernelError, match=message):
            moe_fill.moe_up_fill(case.x_TH, *operands, case.plan, case.plan.missing, case.act())
    many = make_case(65, 1, 2, 32, 32, torch.float32, away=1.0)
    with pytest.raises(KernelError, match="up to 64 tokens, not 65"):
        moe_fill.moe_up_fill(many.x_TH, many.pool.weights, source, many.plan, many.plan.missing, many.act())
