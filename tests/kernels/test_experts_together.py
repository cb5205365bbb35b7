"""Experts of a few rows that share small ops: the truth, and the bits that each has by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.kernels import ClampedUp, HostWork, Products, experts_together, reference
from duoserve.kernels.experts_together import GROUP_ROWS, TILE
from duoserve.kernels.matmul import LEFT_ROWS, has_native_matmul
from duoserve.kernels.weights import ExpertFormat
from tests.kernels.common import assert_close, assert_same_bits, poisoned
from tests.kernels.experts_case import Case, make_case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU computes so")
# Of narrower vectors PyTorch's silu may end otherwise than of single elements, but there nothing is computed so.
equal_bits = pytest.mark.skipif(
    not has_native_matmul(torch.bfloat16), reason="bits are promised for CPUs that multiply bfloat16"
)


@pytest.fixture(autouse=True, scope="module")
def _weights_on_the_left() -> Iterator[None]:
    """As on a CPU that multiplies bfloat16, which that of the tests may not be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_together, "streams_left", lambda x: x.dtype is torch.bfloat16)
        yield


def bf16_case(
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int = 96,
    inter: int = 40,
    seed: int = 0,
    form: ExpertFormat = ExpertFormat.FLOAT,
) -> Case:
    return make_case(tokens, top_k, experts, hidden, inter, torch.bfloat16, (form, 0), away=0.0, seed=seed)


def computed(case: Case, parts: list[list[tuple[int, int]]]) -> Tensor:
    """The rows that experts make, so many of them at a time."""
    act, y = case.act(), case.y()
    for pairs in parts:
        reference.moe_experts(case.x_TH, case.pool.weights, case.plan, HostWork.of(pairs), act, y)
    return y


@equal_bits
@given(
    tokens=st.integers(1, 90),
    experts=st.integers(1, 12),
    sizes=st.sampled_from([(8, 12), (24, 8), (96, 40), (64, 132)]),
    form=st.sampled_from([ExpertFormat.FLOAT, ExpertFormat.BF12]),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_an_expert_has_the_bits_that_it_has_by_itself(
    tokens: int, experts: int, sizes: tuple[int, int], form: ExpertFormat, seed: int, data: st.DataObject
) -> None:
    case = bf16_case(tokens, experts, data.draw(st.integers(1, experts)), *sizes, seed=seed, form=form)
    pairs = data.draw(st.permutations(case.all_work.pairs()))
    cut = data.draw(st.integers(0, len(pairs)))
    alone = computed(case, [[pair] for pair in pairs])
    assert_same_bits(computed(case, [pairs]), alone)
    assert_same_bits(computed(case, [pairs[:cut], pairs[cut:]]), alone)


@equal_bits
def test_silu_ends_alike_wherever_an_element_lies() -> None:
    """Of every bfloat16 there is: in a vector, and among the last of a tensor."""
    every = torch.arange(-(1 << 15), 1 << 15).short().view(torch.bfloat16)
    every = every[every.isfinite()]
    for size in (1, 7, 33):
        parts = [torch.nn.functional.silu(part.clone()) for part in every.split(size)]
        assert_same_bits(torch.cat(parts), torch.nn.functional.silu(every))


@pytest.mark.parametrize("form", [ExpertFormat.FLOAT, ExpertFormat.BF12])
@pytest.mark.parametrize("tokens", [2, TILE, LEFT_ROWS, LEFT_ROWS + 1, 3 * GROUP_ROWS])
def test_the_rows_are_those_of_the_formula(tokens: int, form: ExpertFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some tokens more than one group has room for; what is unpacked comes in blocks."""
    monkeypatch.setattr("duoserve.kernels.weights.WIDEN_ELEMENTS", 16 * 96)
    case = bf16_case(tokens, 24, 3, form=form)
    y = computed(case, [list(case.all_work.pairs())])
    truth = case.true_y(case.true_act())
    assert_close(y[case.computed], truth, torch.bfloat16, roundings=3)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    case = bf16_case(40, 6, 2)
    clean = computed(case, [list(case.all_work.pairs())])
    case.x_TH[7] = float("nan")
    spoiled = computed(case, [list(case.all_work.pairs())])
    others = torch.arange(len(clean)) // case.plan.top_k != 7
    assert_same_bits(spoiled[others], clean[others])
    assert spoiled[~others].isnan().all()


def test_memory_that_nobody_has_filled_is_not_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bf16_case(40, 6, 2)
    clean = computed(case, [list(case.all_work.pairs())])
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape: poisoned(*shape, dtype=x.dtype))
    assert_same_bits(computed(case, [list(case.all_work.pairs())]), clean)


@pytest.mark.parametrize("other", ["products", "clamped", "float32"])
def test_others_are_computed_by_the_two_ops(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if other == "float32" else torch.bfloat16
    case = make_case(20, 2, 4, 96, 40, dtype, away=0.0)
    weights, clamped = case.pool.weights, None
    if other == "products":
        weights = replace(weights, products=Products.BY_ROW)
    if other == "clamped":
        clamped = ClampedUp(torch.zeros(4, 80, dtype=dtype), alpha=1.702, limit=7.0)
    monkeypatch.setattr(reference, "experts_together", None)
    act, y, expected = case.act(), case.y(), case.y()
    reference.moe_experts(case.x_TH, weights, case.plan, case.all_work, act, y, clamped)
    reference.moe_up(case.x_TH, weights, case.plan, case.all_work, act, clamped)
    reference.moe_down(act, weights, case.plan, case.all_work, expected)
    assert_same_bits(y, expected)
