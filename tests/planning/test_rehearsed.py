"""Plans by a rehearsal, on round numbers, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duoserve.planning.model_cards import find_model
from duoserve.planning.planner import Planner
from duoserve.planning.policy_speed import Question
from duoserve.planning.rehearsal import PolicyTimes, PromptTimes, Rehearsal, StepTimes
from duoserve.planning.rehearsed import RehearsedCosts, along
from duoserve.planning.speed import Costs, PromptSpec, StepSpec
from duoserve.replaying.hardware import GIB, Hardware, LayerSizes, Machine
from duoserve.scheduling.policies import POLICIES
from tests.planning.test_speed import HARDWARE, LAYER, SIZES

PROMPT = 100
RESIDENT = PolicyTimes(StepTimes((1.0,), 0.5), PromptTimes((0.0,), (10.0,), 1.0))
CACHED = PolicyTimes(StepTimes((2.0, 3.0, 6.0), 0.5), PromptTimes((2.0, 6.0), (11.0, 15.0), 1.0))
SLOW = PolicyTimes(StepTimes((2.0, 13.0, 16.0), 0.5), PromptTimes((2.0, 6.0), (21.0, 25.0), 1.0))
FETCHED = PolicyTimes(StepTimes((7.0,), 0.5), PromptTimes((8.0,), (20.0,), 1.0))
REHEARSAL = Rehearsal(
    1_000_000,
    PROMPT,
    {
        "resident": {"disk": RESIDENT},
        "lru": {"disk": SLOW, "ram": CACHED},
        "on-demand": {"disk": FETCHED, "ram": FETCHED},
    },
)
FORMULA = Costs(Machine(HARDWARE, LAYER), SIZES, ram_share=1.0)
COSTS = RehearsedCosts.of(FORMULA, REHEARSAL)
LAYERS = 4


def step(hit_rate: float, **change: float) -> StepSpec:
    return replace(StepSpec(sequences=1, context=PROMPT, asked=2.0, hit_rate=hit_rate), **change)


def prompt(resident: float, **change: float) -> PromptSpec:
    return replace(PromptSpec(tokens=PROMPT, sequences=1, used=8.0, resident=resident), **change)


def test_a_step_is_as_many_layers_as_the_model_has() -> None:
    assert COSTS.decode(POLICIES["resident"], step(1.0)).total == pytest.approx(LAYERS * 1.0 + 0.5)
    assert COSTS.decode(POLICIES["on-demand"], step(0.0)).total == pytest.approx(LAYERS * 7.0 + 0.5)


def test_layers_differ_by_how_many_experts_are_missing() -> None:
    for hits, layer_s in ((1.0, 2.0), (0.0, 6.0), (0.5, 0.25 * 2 + 0.5 * 3 + 0.25 * 6)):
        assert COSTS.decode(POLICIES["lru"], step(hits)).total == pytest.approx(LAYERS * layer_s + 0.5)


def test_experts_in_two_tiers_take_the_time_of_either_in_its_share() -> None:
    mixed = replace(COSTS, ram_share=0.25)
    assert mixed.decode(POLICIES["lru"], step(0.0)).total == pytest.approx(0.25 * 24.5 + 0.75 * 64.5)


def test_a_prompt_goes_by_its_copies_from_none_to_all() -> None:
    for resident, layer_s in ((1.0, 10.0), (0.875, 10.5), (0.75, 11.0), (0.5, 13.0), (0.25, 15.0), (0.0, 17.0)):
        assert COSTS.prefill(POLICIES["lru"], prompt(resident)).total == pytest.approx(LAYERS * layer_s + 1.0)
    assert COSTS.prefill(POLICIES["on-demand"], prompt(0.0)).total == pytest.approx(LAYERS * 20.0 + 1.0)


def test_what_was_not_rehearsed_is_scaled_by_the_formulas() -> None:
    policy = POLICIES["lru"]
    for small, large in ((step(0.5), step(0.5, sequences=4, asked=5.0)), (step(0.5), step(0.5, context=100_000))):
        grown = FORMULA.decode(policy, large).total / FORMULA.decode(policy, small).total
        assert COSTS.decode(policy, large).total == pytest.approx(grown * COSTS.decode(policy, small).total)
    short, long = prompt(0.5), prompt(0.5, tokens=100_000)
    grown = FORMULA.prefill(policy, long).total / FORMULA.prefill(policy, short).total
    assert COSTS.prefill(policy, long).total == pytest.approx(grown * COSTS.prefill(policy, short).total)


def test_a_policy_that_was_not_rehearsed_goes_by_the_formulas() -> None:
    policy = POLICIES["layer-prefetch"]
    assert COSTS.decode(policy, step(0.0)) == FORMULA.decode(policy, step(0.0))
    assert COSTS.prefill(policy, prompt(0.0)) == FORMULA.prefill(policy, prompt(0.0))


@pytest.mark.parametrize(
    ("places", "values"),
    [((0.0, 2.0, 4.0), (1.0, 3.0, 7.0)), ((2.0, 4.0, 0.0, 2.0, 4.0), (2.0, 8.0, 1.0, 4.0, 6.0))],
    ids=["in order", "in any order, two at one place"],
)
def test_lines_through_points(places: tuple[float, ...], values: tuple[float, ...]) -> None:
    for place, value in ((0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (4.0, 7.0), (6.0, 11.0)):
        assert along(places, values, place) == pytest.approx(value)


def test_lines_that_would_fall_or_have_one_point_are_flat() -> None:
    assert along((0.0, 2.0), (3.0, 1.0), 9.0) == 1.0
    assert along((5.0,), (4.0,), 9.0) == along((2.0, 2.0), (3.0, 5.0), 9.0) == 4.0


@pytest.mark.parametrize(
    ("copies", "layers_s"), [((2.0, 2.0), (10.0, 12.0, 17.0)), ((0.0, 0.0), (34 / 3, 34 / 3, 34 / 3))]
)
def test_a_prompt_that_copies_as_much_into_few_slots_as_into_many(
    copies: tuple[float, ...], layers_s: tuple[float, ...]
) -> None:
    """Beside what a resident layer takes without copies: 10 s."""
    times = PolicyTimes(StepTimes((2.0, 3.0, 6.0), 0.5), PromptTimes(copies, (10.0, 14.0), 1.0))
    found = Rehearsal(1_000_000, PROMPT, {"resident": {"disk": RESIDENT}, "lru": {"disk": times, "ram": times}})
    costs = RehearsedCosts.of(FORMULA, found)
    for resident, layer_s in zip((1.0, 0.75, 0.125), layers_s, strict=True):
        assert costs.prefill(POLICIES["lru"], prompt(resident)).total == pytest.approx(LAYERS * layer_s + 1.0)


def test_a_planner_goes_by_the_rehearsal_of_the_hardware_and_of_experts_of_that_size() -> None:
    cpu = Hardware("here", 10e9, 20e9, 1e11, 1e-4, 1e-3, host_computes=True, memory_bytes=8 * GIB, host_bytes=0)
    plain = Planner("bard", find_model("bard"))
    question = Question(expert_slots="100%", max_context=1024)
    usual = plain.plan(cpu, question)
    found = Rehearsal(usual.layout.slot_bytes, 512, {"resident": {"disk": RESIDENT}})
    planner = replace(plain, rehearsals={"here": found})
    rehearsed = planner.plan(cpu, question)
    assert rehearsed.best.ttft.total == pytest.approx(6 * 10.0 + 1.0)
    assert rehearsed.notes[-1].startswith("times are those of made-up layers")
    assert planner.plan(replace(cpu, name="there"), question).speeds == usual.speeds
    assert not isinstance(planner.costs(planner.plan(cpu, replace(question, form="int8"))), RehearsedCosts)


def test_sizes_are_those_of_the_formulas() -> None:
    assert isinstance(LAYER, LayerSizes) and REHEARSAL.slot_bytes == LAYER.expert_bytes
