"""One token's experts: against float64 and the twins, in every awkward shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import moe_gemv, reference
from duoserve.kernels.configs import GemvConfig, gemv_config
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits, poisoned
from tests.kernels.experts_case import Case, make_case, well_conditioned

TINY = GemvConfig(4, 32, 4, 3, 1, "several steps and CTAs for small matrices")


def slots_of(case: Case) -> torch.Tensor:
    return case.slots_E[case.ids_TK[0].long()]


@given(
    top_k=st.integers(1, 4),
    hidden=st.sampled_from([8, 11, 64, 130]),
    inter=st.sampled_from([1, 8, 11, 33, 96]),
    dtype=st.sampled_from(DTYPES),
    tiny=st.booleans(),
    has_shared=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=20, deadline=None)
def test_one_token_against_float64(
    top_k: int, hidden: int, inter: int, dtype: torch.dtype, tiny: bool, has_shared: bool, seed: int
) -> None:
    case = make_case(1, top_k, 4, hidden, inter, dtype, seed=seed)
    config, slots, weights = TINY if tiny else None, slots_of(case), case.pool.weights
    generator = torch.Generator().manual_seed(seed)
    topk_weights = torch.rand(1, top_k, generator=generator).to(DEVICE)
    shared = torch.randn(1, hidden, generator=generator).to(dtype).to(DEVICE) if has_shared else None
    experts = case.ids_TK[0].long()
    up = torch.einsum("knh,h->kn", case.w13_ENH.double()[experts], case.x_TH.double()[0])
    true_act = torch.nn.functional.silu(up[:, 0::2]) * up[:, 1::2]
    assume(well_conditioned(true_act))

    act = poisoned(top_k, inter, dtype=dtype)
    moe_gemv.moe_gemv_up(case.x_TH, weights, slots, act, config)
    assert_close(act, true_act, dtype)
    out = poisoned(1, hidden, dtype=dtype)
    moe_gemv.moe_gemv_down(act, weights, slots, topk_weights, shared, out, config)
    true_y = torch.einsum("khi,ki->kh", case.w2_EHI.double()[experts], act.double())
    true_out = topk_weights.double() @ true_y + (0 if shared is None else shared.double())
    assert_close(out, true_out, dtype)

    twin_act, twin_out = torch.empty_like(act), torch.empty_like(out)
    reference.moe_gemv_up(case.x_TH, weights, slots, twin_act)
    reference.moe_gemv_down(act, weights, slots, topk_weights, shared, twin_out)
    # The twin rounds as the CPU's layers do: both projections, silu and their product; each expert's output, the sum.
    assert_close(twin_act, true_act, dtype, roundings=4)
    assert_close(twin_out, true_out, dtype, roundings=2)
    case.pool.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_slots_nor_another_run_change_bits(dtype: torch.dtype) -> None:
    case, weights = make_case(1, 3, 4, 64, 48, dtype), torch.full((1, 3), 1 / 3, device=DEVICE)
    results = []
    for each in (case, case, case.moved()):
        act, out = poisoned(3, 48, dtype=dtype), poisoned(1, 64, dtype=dtype)
        moe_gemv.moe_gemv_up(each.x_TH, each.pool.weights, slots_of(each), act, TINY)
        moe_gemv.moe_gemv_down(act, each.pool.weights, slots_of(each), weights, None, out, TINY)
        results.append((act, out))
    for act, out in results[1:]:
        assert_same_bits(act, results[0][0])
        assert_same_bits(out, results[0][1])


@pytest.mark.parametrize("slot", [-1, 99])
def test_an_expert_without_a_slot_is_not_silent(slot: int) -> None:
    case = make_case(1, 2, 2, 32, 32, torch.float32)
    slots = torch.tensor([int(case.slots_E[0]), slot], dtype=torch.int32, device=DEVICE)
    act, out = torch.zeros(2, 32, device=DEVICE), torch.zeros(1, 32, device=DEVICE)
    moe_gemv.moe_gemv_up(case.x_TH, case.pool.weights, slots, act)
    assert not bool(act[0].isnan().any()) and bool(act[1].isnan().all())
    moe_gemv.moe_gemv_down(act.nan_to_num(), case.pool.weights, slots, torch.ones(1, 2, device=DEVICE), None, out)
    assert bool(out.isnan().all())


def test_loads_have_no_masks_where_a_block_divides() -> None:
    assert gemv_config(torch.bfloat16, 90, 2048).block_k == 512
    assert gemv_config(torch.bfloat16, 90, 768).block_k == 256
    assert gemv_config(torch.bfloat16, 90, 1408).block_k == 128
    assert gemv_config(torch.bfloat16, 90, 11).block_k == 256


def test_wrong_operands_are_refused() -> None:
    case = make_case(1, 2, 4, 32, 32, torch.float16)
    slots, act, out = slots_of(case), poisoned(2, 32, dtype=torch.float16), poisoned(1, 32, dtype=torch.float16)
    scale = torch.ones(1, 2, device=DEVICE)
    weights = case.pool.weights
    with pytest.raises(KernelError, match="slots_K is"):
        moe_gemv.moe_gemv_up(case.x_TH, weights, slots.long(), act)
    with pytest.raises(KernelError, match="x_1H has shape"):
        moe_gemv.moe_gemv_up(case.x_TH.repeat(2, 1), weights, slots, act)
    with pytest.raises(KernelError, match="topk_weights_1K is"):
        moe_gemv.moe_gemv_down(act, weights, slots, scale.half(), None, out)
    with pytest.raises(KernelError, match="shared_1H is"):
        moe_gemv.moe_gemv_down(act, weights, slots, scale, out.float(), out)
