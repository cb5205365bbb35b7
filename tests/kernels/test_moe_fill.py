"""Read-through fill: the bits of the resident computation, and slots filled byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import Work, moe_fill, moe_gemm
from duoserve.kernels.configs import MEDIUM, SMALL, gemm_config
from tests.kernels.common import DEVICE, DTYPES, POISON, assert_same_bits
from tests.kernels.experts_case import Case, cases, make_case


class HostRows:
    """The experts that are away: their rows in memory of the host that the device reads, their slots full of NaN."""

    def __init__(self, case: Case) -> None:
        self.full_SB = case.pool.rows_SB.clone()
        self.away = [(expert, int(case.slots_E[expert])) for expert, _ in case.plan.missing.pairs()]
        self.rows_SB = self.full_SB.cpu().pin_memory() if DEVICE.type == "cuda" else self.full_SB.clone()
        addresses = torch.zeros(len(case.slots_E), dtype=torch.int64)
        for expert, slot in self.away:
            addresses[expert] = self.rows_SB[slot].data_ptr()
            case.pool.rows_SB[slot] = POISON
        self.addresses_E = addresses.to(DEVICE)


def filled(case: Case, host: HostRows) -> tuple[torch.Tensor, torch.Tensor]:
    act, y, weights, plan = case.act(), case.y(), case.pool.weights, case.plan
    arriving = Work.of(host.away, DEVICE)
    moe_gemm.moe_up(case.x_TH, weights, plan, plan.resident, act)
    moe_fill.moe_up_fill(case.x_TH, weights, host.addresses_E, plan, arriving, act)
    moe_gemm.moe_down(act, weights, plan, plan.resident, y)
    moe_fill.moe_down_fill(act, weights, host.addresses_E, plan, arriving, y)
    return act, y


@given(case=cases(st.sampled_from(DTYPES)))
@settings(max_examples=12, deadline=None)
def test_fill_gives_the_resident_bits_and_fills_the_slots(case: Case) -> None:
    tokens = len(case.x_TH)
    config = gemm_config(case.x_TH.dtype, 0, SMALL if tokens <= SMALL else MEDIUM)
    act, y = case.act(), case.y()
    moe_gemm.moe_up(case.x_TH, case.pool.weights, case.plan, case.all_work, act, config)
    moe_gemm.moe_down(act, case.pool.weights, case.plan, case.all_work, y, config)
    host = HostRows(case)
    filled_act, filled_y = filled(case, host)
    assert_same_bits(filled_act, act)
    assert_same_bits(filled_y, y)
    # Padding between and after the matrices is not copied, and was NaN in the pool as it was in the rows.
    assert torch.equal(case.pool.rows_SB, host.full_SB)


def test_an_expert_without_address_or_slot_is_not_silent() -> None:
    case = make_case(3, 1, 2, 32, 32, torch.float32, away=1.0)
    host = HostRows(case)
    before = case.pool.rows_SB.clone()
    for addresses, slot in ((host.addresses_E * 0, 0), (host.addresses_E, -1), (host.addresses_E, 99)):
        act = torch.zeros_like(case.act())
        work = Work.of([(expert, slot) for expert, _ in host.away], DEVICE)
        moe_fill.moe_up_fill(case.x_TH, case.pool.weights, addresses, case.plan, work, act)
        assert bool(act.isnan().all())
    assert torch.equal(case.pool.rows_SB, before)


def test_wrong_operands_are_refused() -> None:
    case = make_case(3, 1, 2, 32, 32, torch.float32, away=1.0)
    addresses = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for wrong, message in ((addresses.int(), "addresses_E is"), (addresses[:1], "has shape")):
        with pytest.raises(KernelError, match=message):
            moe_fill.moe_up_fill(case.x_TH, case.pool.weights, wrong, case.plan, case.plan.missing, case.act())
    many = make_case(65, 1, 2, 32, 32, torch.float32, away=1.0)
    with pytest.raises(KernelError, match="up to 64 tokens"):
        moe_fill.moe_up_fill(many.x_TH, many.pool.weights, addresses, many.plan, many.plan.missing, many.act())
