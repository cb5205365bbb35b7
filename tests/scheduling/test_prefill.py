"""The pure plan of a prefill."""

from __future__ import annotations

import pytest

from duoserve.experts.layout import ExpertId
from duoserve.scheduling.plan import BEFORE_FIRST, LayerPlan, LayerView, ModelShape, PrefillFetch, RingView
from duoserve.scheduling.prefill import active_share, plan_prefill, ring_size

OVERLAP = PrefillFetch.OVERLAP
SHAPE = ModelShape(num_experts=4, top_k=2, layers=(0, 1, 2))
LONG = 100


def overlap(view: LayerView) -> LayerPlan:
    return plan_prefill(PrefillFetch.OVERLAP, view, SHAPE)


def test_demands_what_is_neither_in_a_slot_nor_on_its_way_in_the_order_wanted() -> None:
    view = LayerView(1, (3, 0, 2, 1), {1: frozenset({0})}, LONG)
    for mode in PrefillFetch:
        assert plan_prefill(mode, view, SHAPE).demand == (3, 2, 1)


def test_speculates_layer_by_layer_past_what_is_present_as_far_as_the_ring_goes() -> None:
    present = {1: frozenset({0, 1, 3}), 2: frozenset({1})}
    plan = overlap(LayerView(0, (), present, LONG, RingView(may_prefetch=3)))
    assert plan.prefetch == (ExpertId(1, 2), ExpertId(2, 0), ExpertId(2, 2))
    assert plan.ahead == (1, 2)


def test_speculates_on_the_first_layer_before_it_is_routed() -> None:
    plan = overlap(LayerView(BEFORE_FIRST, (), {}, LONG, RingView(may_prefetch=2)))
    assert plan.prefetch == (ExpertId(0, 0), ExpertId(0, 1))


def test_skips_layers_that_have_no_experts() -> None:
    shape = ModelShape(num_experts=2, top_k=1, layers=(1, 4))
    view = LayerView(1, (0, 1), {}, LONG, RingView(may_prefetch=9))
    assert plan_prefill(PrefillFetch.OVERLAP, view, shape).prefetch == (ExpertId(4, 0), ExpertId(4, 1))


def test_a_short_prompt_does_not_speculate() -> None:
    view = LayerView(0, (0,), {}, 1, RingView(may_prefetch=4))
    assert overlap(view).prefetch == ()
    assert len(overlap(view._replace(num_tokens=2)).prefetch) == 4  # 1 - (1 - 2/4)^2 is just 0.75


def test_active_share() -> None:
    assert active_share(SHAPE, 1) == 0.5
    assert active_share(ModelShape(128, 8, (0,)), 16) == pytest.approx(0.644, abs=1e-3)


def test_keeps_the_most_wanted_of_those_that_pass_through() -> None:
    ring = RingView(settled=frozenset({3}), may_keep=2)
    assert overlap(LayerView(0, (3, 1, 2, 0), {}, LONG, ring)).keep == {1, 2}


def test_the_ring_is_no_larger_than_what_has_to_pass_it() -> None:
    assert [ring_size(OVERLAP, SHAPE, LONG, *of) for of in ((16, 50), (3, 50), (16, 2), (64, 0))] == [4, 3, 2, 0]


def test_the_ring_grows_with_the_prompt_as_far_as_the_cache_can_spare_it() -> None:
    many = ModelShape(128, 8, (0,))
    assert [ring_size(OVERLAP, many, tokens, 768, 6000) for tokens in (63, 64, 8192, 99999)] == [4, 5, 132, 384]
    assert [ring_size(OVERLAP, many, 8192, slots, 6000) for slots in (3, 8, 10, 100)] == [3, 4, 5, 50]


def test_two_buffers_are_two_and_bring_every_expert_however_short_the_prompt() -> None:
    mode = PrefillFetch.TWO_BUFFERS
    assert [ring_size(mode, SHAPE, 8192, *of) for of in ((16, 50), (1, 50), (16, 1))] == [2, 1, 1]
    view = LayerView(1, (0,), {}, 1, RingView(may_prefetch=2))
    assert plan_prefill(mode, view, SHAPE).prefetch == tuple(ExpertId(2, expert) for expert in (0, 1))
    assert plan_prefill(OVERLAP, view, SHAPE).prefetch == ()


def test_next_layer_fetches_one_layer_ahead_and_does_not_wrap_around() -> None:
    view = LayerView(0, (0,), {1: frozenset({2})}, 1)
    plan = plan_prefill(PrefillFetch.NEXT_LAYER, view, SHAPE)
    assert plan.prefetch == (ExpertId(1, 0), ExpertId(1, 1), ExpertId(1, 3))
    assert plan_prefill(PrefillFetch.NEXT_LAYER, view._replace(layer=2), SHAPE).prefetch == ()


def test_only_on_demand_waits_for_all() -> None:
    waits = [mode for mode in PrefillFetch if not plan_prefill(mode, LayerView(0, (0,), {}, 1), SHAPE).overlap]
    assert waits == [PrefillFetch.ON_DEMAND]
