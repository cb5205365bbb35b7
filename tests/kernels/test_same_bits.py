"""The bits of the experts' GEMMs: neither runs, slots, tiles' order, launches nor the batch may change them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from duoserve.kernels.weights import ExpertFormat
from tests.kernels.common import DTYPES, assert_same_bits
from tests.kernels.experts_case import FLOAT, Case, layer, make_case
from tests.kernels.quantized_case import LAYOUTS

HALF = torch.float16
KINDS = (*((FLOAT, dtype) for dtype in DTYPES), *((form, HALF) for form in LAYOUTS))


@cache  # both tests of a kind ask for it, and change nothing of it
def first_run(form: tuple[ExpertFormat, int], dtype: torch.dtype) -> tuple[Case, tuple[torch.Tensor, torch.Tensor]]:
    """A small case and its layer."""
    case = small_case(form, dtype)
    return case, layer(case, case.tiny())


def small_case(form: tuple[ExpertFormat, int], dtype: torch.dtype) -> Case:
    """Two experts with two tiles of rows each; several tiles of weights, several steps where a group is not all."""
    format, group = form
    hidden, inter = {ExpertFormat.FP8: (144, 32), ExpertFormat.MXFP4: (64, 32)}.get(format, (64, 48))
    if format is ExpertFormat.INT4:
        hidden, inter = max(64, group), group
    return make_case(18, 2, 2, hidden, inter, dtype, form)


@pytest.mark.parametrize(("form", "dtype"), KINDS)
def test_runs_slots_and_the_order_of_tiles(form: tuple[ExpertFormat, int], dtype: torch.dtype) -> None:
    case, first = first_run(form, dtype)
    moved, tiny = case.moved(), case.tiny()
    assert_layers_same(layer(case, tiny), first)
    assert_layers_same(layer(moved, replace(tiny, group_t=1)), first)
    assert_layers_same(layer(moved, replace(case.tiny(tma=True), ctas_per_sm=100)), first)
    moved.pool.check()


@pytest.mark.parametrize(("form", "dtype"), KINDS)
def test_a_row_alone_and_in_a_batch_and_any_split_into_launches(
    form: tuple[ExpertFormat, int], dtype: torch.dtype
) -> None:
    case, whole = first_run(form, dtype)
    for token, tma in ((0, True), (17, False)):
        assert_same_bits(layer(case.alone(token), case.tiny(tma))[1], whole[1].view(18, 2, -1)[token])
    one_by_one = [[pair] for pair in reversed(case.all_work.pairs())]
    assert_layers_same(layer(case, case.tiny(), one_by_one), whole)


@pytest.mark.parametrize("form", [FLOAT, (ExpertFormat.INT4, 32)])
def test_tokens_that_are_alike_get_the_same_bits(form: tuple[ExpertFormat, int]) -> None:
    """Whatever their place in a tile, and in whichever tile."""
    case = make_case(20, 2, 4, 64, 32, HALF, form, skew="repeated")
    y = layer(case, case.tiny())[1].view(20, 2, -1)
    assert_same_bits(y, y[:1].expand_as(y))


def assert_layers_same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_bits(mine, other)
