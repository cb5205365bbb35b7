"""The pure plan of a decode step."""

from __future__ import annotations

import pytest

from duoserve.experts.layout import ExpertId
from duoserve.scheduling.decode import plan_decode
from duoserve.scheduling.plan import BEFORE_FIRST, NO_GUESSES, DecodeFetch, Guesses, LayerView, ModelShape

SHAPE = ModelShape(num_experts=3, top_k=2, layers=(0, 1, 2))


@pytest.mark.parametrize("mode", [DecodeFetch.CACHE, DecodeFetch.ON_DEMAND])
def test_brings_the_misses_and_nothing_else(mode: DecodeFetch) -> None:
    plan = plan_decode(mode, LayerView(1, (2, 0), {1: frozenset({0})}, 1), SHAPE)
    assert plan.demand == (2,)
    assert plan.prefetch == () and plan.keep == frozenset()
    assert plan.overlap is (mode is DecodeFetch.CACHE)


@pytest.mark.parametrize("mode", [DecodeFetch.CACHE, DecodeFetch.ON_DEMAND])
def test_guesses_change_neither_the_misses_nor_whether_they_are_awaited(mode: DecodeFetch) -> None:
    view, guesses = LayerView(1, (2, 0), {1: frozenset({0})}, 1), Guesses((), (2,), frozenset({ExpertId(2, 1)}))
    plan, unguessed = plan_decode(mode, view, SHAPE, guesses), plan_decode(mode, view, SHAPE, NO_GUESSES)
    assert (plan.ahead, plan.spared) == (guesses.ahead, guesses.spared)
    assert plan._replace(ahead=(), spared=frozenset()) == unguessed


@pytest.mark.parametrize(("layer", "ahead"), [(BEFORE_FIRST, 0), (0, 1), (1, 2), (2, 0)])
def test_next_layer_wraps_around_to_the_next_token(layer: int, ahead: int) -> None:
    plan = plan_decode(DecodeFetch.NEXT_LAYER, LayerView(layer, (), {ahead: frozenset({1})}, 1), SHAPE)
    assert plan.prefetch == (ExpertId(ahead, 0), ExpertId(ahead, 2))
    assert plan.ahead == (ahead,)


def test_a_single_layer_is_not_its_own_next() -> None:
    shape = ModelShape(num_experts=3, top_k=1, layers=(5,))
    assert plan_decode(DecodeFetch.NEXT_LAYER, LayerView(5, (0,), {}, 1), shape).prefetch == ()
