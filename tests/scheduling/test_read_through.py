"""Steps that a device carries out by itself, played on a device made of a dictionary: the books agree with it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.config import Phase
from duoserve.errors import IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotState
from duoserve.experts.tickets import TicketState
from duoserve.kernels import by_demand
from duoserve.scheduling.account import ALLOWED_TIME
from duoserve.scheduling.link_budget import IdleLink, StepLink
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import EVICTIONS, get_policy
from duoserve.scheduling.read_through import Fill, fills, most_misses, spread_targets
from tests.scheduling.fortune import Teller, certain
from tests.scheduling.read_through_rig import FakeDevice
from tests.scheduling.rig import Rig

LAYERS, NUM_EXPERTS = 3, 12


@given(
    slots=st.one_of(st.integers(3, 12), st.integers(16, 36)),
    top_k=st.integers(1, 2),
    tokens=st.integers(1, 3),
    moe_layers=st.sampled_from([None, [1, 2]]),
    policy=st.sampled_from(["lru", "duoserve", "lookahead", "activation-matrix", "duoserve-paper"]),
    gap_s=st.sampled_from([0.0, 0.5, 1.5, 4.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_the_books_agree_with_the_device(
    slots: int, top_k: int, tokens: int, moe_layers: list[int] | None, policy: str, gap_s: float, seed: int
) -> None:
    """Few slots, of which all may be spare, and many, of which more are than a layer needs.

    A copy takes a second. Some predict whatever comes to their minds, and are cut short by the next step.
    """
    rng, dice = random.Random(seed), np.random.default_rng(seed)
    teller = Teller(lambda layer: dice.random(NUM_EXPERTS), horizon=1 + seed % 3) if policy != "lru" else None
    rig = Rig(
        policy,
        layers=LAYERS,
        experts=NUM_EXPERTS,
        top_k=top_k,
        slots=slots,
        moe_layers=moe_layers,
        predictor=teller,
    )
    device, width = FakeDevice(rig, gap_s=gap_s), min(NUM_EXPERTS, top_k * tokens)
    layers = moe_layers or list(range(LAYERS))
    for _ in range(30):
        chosen = {layer: rng.sample(range(NUM_EXPERTS), rng.randint(1, width)) for layer in layers}
        if slots < width:
            with pytest.raises(IntegrityError, match=f"may miss {width} experts; {slots} slots"):
                device.step(chosen, tokens)
            return
        if rng.random() < 0.3 and moe_layers is None:  # an ordinary step or a prompt between them
            rig.run(rng.choice(list(Phase)), [chosen[layer] for layer in layers], tokens=tokens)
        before = rig.stats()
        hits = device.step(chosen, tokens)
        misses, after = sum(map(len, chosen.values())) - hits, rig.stats()
        assert after.hits["decode"] - before.hits["decode"] == hits
        assert after.misses["decode"] - before.misses["decode"] == misses
        assert after.bytes.demanded - before.bytes.demanded == misses * rig.store.layout.slot_bytes
        assert rig.num_states(SlotState.LOADING) == len(rig.scheduler._residency.under_way())


def test_the_rankings_hear_of_a_step_as_they_do_of_one_that_the_host_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("lru", layers=1, experts=8, top_k=3, slots=6)
    device, heard = FakeDevice(rig), []
    used = device.books._used
    monkeypatch.setattr(device.books, "_used", lambda *what: heard.append(what) or used(*what))
    device.step({0: [5, 2, 3]}, tokens=1)
    device.books.catch_up()
    assert heard == [(0, by_demand({5: 1, 2: 1, 3: 1}), [1, 1, 1])]


def test_what_is_chosen_again_is_a_hit_and_the_longest_unused_goes_first() -> None:
    rig = Rig("lru", layers=1, experts=8, top_k=2, slots=4)
    device = FakeDevice(rig)
    for chosen in ([1, 0], [0, 2], [0, 3]):
        device.step({0: chosen}, tokens=1)
    assert (rig.stats().hits["decode"], rig.stats().misses["decode"]) == (2, 4)
    assert rig.resident() == {ExpertId(0, 0), ExpertId(0, 3), ExpertId(0, 2)}


def test_the_eviction_hears_what_a_step_has_used() -> None:
    seldom_used_first = replace(get_policy("duoserve"), eviction=EVICTIONS["lfru"])
    rig = Rig(seldom_used_first, layers=1, experts=8, top_k=2, slots=6)
    device = FakeDevice(rig)
    for chosen in ([0, 1], [0, 1], [0, 1], [2, 3], [4, 5], [6, 7]):
        device.step({0: chosen}, tokens=1)
    device.books.catch_up()
    assert {ExpertId(0, 0), ExpertId(0, 1)} <= rig.resident()


def test_what_a_step_has_used_was_before_the_prompt_that_follows() -> None:
    rig = Rig("lru", layers=1, experts=8, top_k=2, slots=6)
    device = FakeDevice(rig)
    device.step({0: [0, 1]}, tokens=1)
    rig.prefill([[2, 3]], tokens=1)
    device.step({0: [4, 5]}, tokens=1)
    device.books.catch_up()
    assert rig.resident() == {ExpertId(0, expert) for expert in (2, 3, 4, 5)}


def test_what_a_step_has_used_is_worth_less_once_a_prompt_has_come() -> None:
    seldom_used_first = replace(get_policy("duoserve"), eviction=EVICTIONS["lfru"])
    rig = Rig(seldom_used_first, layers=1, experts=8, top_k=2, slots=6)
    device = FakeDevice(rig)
    for chosen in ([2, 3], [2, 3], [0, 1]):
        device.step({0: chosen}, tokens=1)
    rig.prefill([[4, 5]], tokens=1)
    device.step({0: [4, 5]}, tokens=1)
    assert rig.resident() == {ExpertId(0, expert) for expert in (2, 3, 4, 5)}


def guessed_again() -> tuple[Rig, FakeDevice]:
    """A step has used an expert and given it up while it ran; now it comes into the same slot again, as a guess."""
    teller = Teller(lambda layer: certain(12, [7] if layer == 0 else []))
    longest_unused_first = replace(get_policy("lookahead"), eviction=get_policy("lru").eviction)
    rig = Rig(longest_unused_first, layers=2, experts=12, top_k=1, slots=16, predictor=teller)
    for first, second in [*((number, number) for number in range(7)), (7, 6), (8, 6)]:
        rig.decode([[first], [second]])
    for number in (1, 2, 3, 4, 5, 6):  # all but those in slots 0, 1 and, third, 14
        rig.decode([[number], [number]])
    slot = rig.table.slot_of(ExpertId(0, 7))
    device = FakeDevice(rig, gap_s=9.0)
    device.step({0: [1], 1: [7]}, tokens=1)
    assert device.step({0: [7], 1: [7]}, tokens=1) == 2
    assert rig.table.slot_of(ExpertId(0, 7)) == slot and rig.table.state(slot) is SlotState.LOADING
    return rig, device


def test_what_a_step_has_used_may_be_a_guess_again_when_a_prompt_comes() -> None:
    rig, device = guessed_again()
    rig.prefill([[1], [2]], tokens=1)
    assert device.step({0: [1], 1: [2]}, tokens=1) == 2


def test_a_guess_that_a_step_has_used_before_it_was_one_is_yet_to_come_true() -> None:
    rig, device = guessed_again()
    before = rig.stats()
    device.step({0: [1], 1: [7]}, tokens=1)
    assert rig.stats().bytes.prefetched_useful == before.bytes.prefetched_useful
    device.step({0: [7], 1: [7]}, tokens=1)
    assert rig.stats().bytes.prefetched_useful == before.bytes.prefetched_useful + rig.store.layout.slot_bytes


def test_a_step_keeps_an_eighth_of_the_slots_free() -> None:
    rig = Rig("lru", layers=2, experts=32, top_k=2, slots=40)
    device = FakeDevice(rig)
    for first in range(0, 32, 2):
        device.step({0: [first, first + 1], 1: [first, first + 1]}, tokens=1)
    rig.scheduler.begin(Phase.DECODE, 1)
    device.books.lay_targets(1)
    assert rig.num_states(SlotState.EMPTY) == 4  # two layers of two misses each need no fifth


def test_where_all_experts_have_slots_none_is_given_up() -> None:
    rig = Rig("resident", layers=2, experts=4, top_k=2, slots=8)
    rig.scheduler.load_all()
    device = FakeDevice(rig)
    assert [device.step({0: [3, 1], 1: [0, 2]}, tokens=1) for _ in range(3)] == [4, 4, 4]
    assert len(rig.resident()) == 8 and device.books.fits(num_tokens=100)


def test_a_step_that_would_miss_an_expert_where_none_may_be_missing_is_refused() -> None:
    rig = Rig("resident", layers=2, experts=4, top_k=2, slots=8)
    device = FakeDevice(rig)
    rig.scheduler.begin(Phase.DECODE, 1)
    with pytest.raises(IntegrityError, match="a step may miss 2 experts, of which all were to be in slots"):
        device.books.lay_targets(1)


def test_the_last_layer_to_fill_a_slot_has_it() -> None:
    ids_NBK, slots_NBK = np.array([[[3, 1]], [[2, 0]]]), np.array([[[-1, -1]], [[7, -1]]])
    assert fills([4, 6], ids_NBK, slots_NBK, targets_NX=np.array([[5, 6], [6, 5]])) == [
        Fill(ExpertId(4, 1), 5, True),
        Fill(ExpertId(4, 3), 6, False),
        Fill(ExpertId(6, 0), 6, True),
    ]


def test_first_choices_are_spread_and_no_layer_has_a_slot_twice() -> None:
    targets_LX = spread_targets([10, 11, 12, 13], num_layers=2, width=3)
    assert targets_LX.tolist() == [[10, 11, 12], [12, 13, 10]]
    assert spread_targets([4, 9], num_layers=3, width=2).tolist() == [[4, 9], [4, 9], [9, 4]]
    assert most_misses(ModelShape(8, 2, (0, 1)), 3) == 6 and most_misses(ModelShape(8, 2, (0, 1)), 9) == 8


class Knowing(Teller):
    """Knows the first layer of the next step."""

    def __init__(self, steps: list[list[int]], claim: float = 0.95, experts: int = NUM_EXPERTS) -> None:
        super().__init__(lambda layer: certain(experts, steps[0] if steps else [], claim))
        self.steps = steps

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        super().begin(phase, requests_T)
        if phase is Phase.DECODE and self.steps:
            self.steps.pop(0)


def course(
    policy: str, gap_s: float, guesses: bool = True, experts: int = NUM_EXPERTS, slots: int = 12
) -> tuple[Rig, list[int]]:
    """Two hundred steps of two layers, of which the first never uses an expert twice in a row, and their hits."""
    steps = [[(2 * step) % experts, (2 * step + 1) % experts] for step in range(201)]
    chosen = get_policy(policy) if guesses else get_policy(policy).without_guesses()
    predictor = Knowing([[], *steps], experts=experts)
    rig = Rig(chosen, layers=2, experts=experts, slots=slots, predictor=predictor)
    rig.decode([[0, 1]] * 2, attention_s=9.0)  # as the first steps of a shape are: the link is measured
    device = FakeDevice(rig, miss_s=1.0, gap_s=gap_s)
    return rig, [device.step({0: step, 1: [0, 1]}, tokens=1) for step in steps[:200]]


class TestGuesses:
    """A copy takes a second. The second layer has what it wants; the first would have to read both experts through."""

    @pytest.mark.parametrize("policy", ["lookahead", "duoserve"])
    @pytest.mark.parametrize(
        ("experts", "slots"), [(12, 12), (32, 24)]
    )  # with 24 more are kept free than a layer fills
    def test_what_is_copied_between_two_steps_is_a_hit_in_the_next(self, policy: str, experts: int, slots: int) -> None:
        rig, hits = course(policy, gap_s=2.5, experts=experts, slots=slots)
        assert hits[-20:] == [4] * 20
        assert rig.stats().bytes.prefetched_useful > 0 and rig.stats().bytes.wasted == 0

    def test_only_whole_copies_between_the_steps_are_within_the_budget(self) -> None:
        _, hits = course("duoserve", gap_s=1.5)
        assert hits[-20:] == [3] * 20

    def test_where_no_copy_is_made_in_time_the_budget_is_zero(self) -> None:
        (rig, hits), (quiet, unguessed) = (course("duoserve", 0.9, guesses) for guesses in (True, False))
        assert not rig.engine.guesses and hits == unguessed
        assert rig.clock.now == quiet.clock.now

    def test_nothing_is_on_its_way_while_a_step_runs(self) -> None:
        """Where guesses are made whatever they cost, the step waits for what has begun, and the rest is cancelled."""
        rig, _ = course("lookahead", gap_s=0.5)
        states = {ticket.state for ticket in rig.engine.guesses if ticket.finished}
        assert states == {TicketState.DONE, TicketState.CANCELLED}

    def test_a_prompt_between_two_steps_does_not_count_as_idle_time(self) -> None:
        link = StepLink(IdleLink(2, 4))
        link._link.copy_s = 1.0
        link.asked(0.0, ())
        link.launched(2.5)
        assert link.idle_before(0) == 2.0
        link.asked(3.0, ())
        link.pause()
        link.launched(100.0)
        assert link.idle_before(0) == 2.0

    def test_what_guesses_are_worth_is_accounted_for(self) -> None:
        """One that comes true saves a copy. Each risks a victim, and time where the next step has to wait for it."""
        link = StepLink(IdleLink(2, 100))
        link._link.copy_s = 1.0
        link.stepped(0.0, hits=1.0, came_true=0)
        link.asked(0.0, [4, 4])
        link.launched(1.5)  # half a second early
        link.stepped(2.0, hits=1.0, came_true=2)
        assert link.account._funds_s == pytest.approx(ALLOWED_TIME * 2.0 + 2.0 - 2 * 0.25 - 0.5)

    @given(
        slots=st.integers(8, 20),
        gap_s=st.floats(0.0, 3.0),
        memory=st.floats(0.0, 0.95),
        precision=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
        claim=st.sampled_from([0.3, 0.6, 0.95]),
        seed=st.integers(0, 2**31),
    )
    @settings(
        max_examples=30, deadline=None, phases=[Stage.explicit, Stage.reuse, Stage.generate]
    )  # no shrinking: slow
    def test_they_make_no_steps_slower(
        self, slots: int, gap_s: float, memory: float, precision: float, claim: float, seed: int
    ) -> None:
        """Whatever the predictor says of the next step's first layer, and of itself."""
        rng = random.Random(seed)
        steps = [rng.sample(range(NUM_EXPERTS), 2)]
        for _ in range(200):
            new = rng.sample(range(NUM_EXPERTS), 2)
            steps.append(steps[-1] if rng.random() < memory else new)
        walls = []
        for policy in (get_policy("duoserve"), get_policy("duoserve").without_guesses()):
            said = [[one if rng.random() < precision else rng.randrange(NUM_EXPERTS) for one in step] for step in steps]
            rig = Rig(policy, layers=2, experts=NUM_EXPERTS, slots=slots, predictor=Knowing([[], *said], claim))
            rig.decode([[0, 1]] * 2, attention_s=9.0)
            device = FakeDevice(rig, miss_s=1.0, gap_s=gap_s)
            for step in steps:
                device.step({0: step, 1: step}, tokens=1)
            walls.append(rig.clock.now)
        assert walls[0] <= 1.01 * walls[1] + 1.0
