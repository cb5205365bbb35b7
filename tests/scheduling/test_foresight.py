"""Guesses, from what a predictor says to the link: what is copied, what is cancelled, and when it stops."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import TicketState
from duoserve.scheduling.foresight import Foresight
from duoserve.scheduling.link_budget import Demand
from duoserve.scheduling.plan import NO_GUESSES, DecodeFetch, Guesses, GuessMode, ModelShape
from duoserve.scheduling.policies import get_policy
from tests.helpers.fakes import SMALL
from tests.scheduling.fortune import Teller, certain, routed
from tests.scheduling.rig import Rig

SHAPE = ModelShape(num_experts=8, top_k=2, layers=(0, 1, 2, 3))
NOBODY: list[set[int]] = [set()] * 4
ONE = SMALL.slot_bytes


def drawn(rng: random.Random, layers: int = 4) -> list[list[int]]:
    return [rng.sample(range(8), 2) for _ in range(layers)]


class Seer(Teller):
    """Knows the routing of the step that runs, and ``lies`` about it if told to."""

    def __init__(self, horizon: int = 1) -> None:
        super().__init__(self._say, horizon)
        self.steps: list[list[list[int]]] = []
        self.lies = False

    def _say(self, layer: int) -> np.ndarray:
        step = self.steps[1] if layer <= self.heard[-1] else self.steps[0]
        truth = certain(8, step[layer])
        return 0.95 - truth if self.lies else truth

    def run(self, rig: Rig, num_steps: int, rng: random.Random, **times: float) -> None:
        self.steps = [*self.steps, *(drawn(rng) for _ in range(num_steps + 1))][-num_steps - 1 :]
        for _ in range(num_steps):
            rig.decode(self.steps[0], **times)
            self.steps.pop(0)


class TestTopK:
    def test_the_likeliest_of_the_next_layers_are_copied_unless_they_are_there(self) -> None:
        foresight = Foresight(Teller(lambda layer: np.linspace(0, 0.7, 8), 2), GuessMode.TOP_K, SHAPE)
        guesses = foresight.guess(2, [set(), set(), set(), {7}], ())
        assert guesses.ahead == (3, 0)
        assert guesses.copies == (ExpertId(3, 6), ExpertId(0, 7), ExpertId(0, 6))
        assert ExpertId(3, 7) in guesses.spared

    def test_right_guesses_are_hits_across_the_end_of_a_step(self) -> None:
        seer = Seer()
        rig = Rig("duoserve-paper", slots=6, predictor=seer)
        seer.run(rig, 10, random.Random(1), attention_s=1.5, expert_s=1.0)
        stats = rig.stats()
        assert (stats.hits["decode"], stats.misses["decode"]) == (10 * 8 - 2, 2)  # nobody predicts the first layer
        assert stats.bytes.wasted == 0


class TestBudget:
    def test_nothing_is_copied_before_the_link_has_been_measured(self) -> None:
        foresight = Foresight(Teller(lambda layer: certain(8, [1])), GuessMode.BUDGET, SHAPE)
        assert foresight.guess(0, NOBODY, ()).copies == ()

    def test_a_seer_turns_idle_time_into_hits(self) -> None:
        rates, walls = [], []
        for policy in ("duoserve", "lru"):
            seer = Seer()
            rig = Rig(policy, slots=12, predictor=seer)
            rng = random.Random(2)
            seer.run(rig, 40, rng, attention_s=3.0, expert_s=0.1)  # until it has earned that it may risk something
            rig.meter.reset()
            begun = rig.clock.now
            seer.run(rig, 40, rng, attention_s=3.0, expert_s=0.1)
            rates.append(rig.stats().hit_rate(Phase.DECODE))
            walls.append(rig.clock.now - begun)
        assert rates[0] is not None and rates[1] is not None and rates[0] > 0.9 and rates[1] < 0.6
        assert walls[0] < 0.75 * walls[1]

    def test_a_liar_is_given_no_bytes_and_gets_them_back_when_it_speaks_true(self) -> None:
        seer, rng = Seer(), random.Random(3)
        rig = Rig("duoserve", slots=12, predictor=seer)
        prefetches = []
        for lies in (True, True, False, False):
            seer.lies = lies
            before = len(rig.engine.guesses)
            seer.run(rig, 40, rng, attention_s=3.0, expert_s=0.1)
            prefetches.append(len(rig.engine.guesses) - before)
        assert prefetches[0] < 60 and prefetches[1] <= 2
        assert prefetches[3] > 100

    def test_a_link_that_is_never_idle_gets_no_guesses(self) -> None:
        rng = random.Random(4)
        rig = Rig("duoserve", slots=12, predictor=Teller(lambda layer: certain(8, [1, 2], 0.8)), copy_s=100.0)
        for _ in range(20):
            rig.decode(drawn(rng), attention_s=1.0, expert_s=0.1)
        assert not rig.engine.guesses

    def test_of_two_layers_ahead_the_nearer_comes_first(self) -> None:
        foresight = Foresight(Teller(lambda layer: certain(8, [layer]), 2), GuessMode.BUDGET, SHAPE)
        foresight.link.copy_s = 1.0
        foresight.link.account.settle(1.0, 31.0, 1.0)
        for layer in (0, 1, 2, 3, 0):
            foresight.link.routed(layer, 10.0 * layer)
            foresight.link.demanded(Demand(0, 0, 0, alone=True))
        assert foresight.guess(0, NOBODY, ()).copies == (ExpertId(1, 1), ExpertId(2, 2))
        assert foresight.guess(0, NOBODY, [ExpertId(1, 0)] * 30).copies == ()


def test_a_guess_that_the_router_contradicts_is_cancelled() -> None:
    rig = Rig("lookahead", slots=12, predictor=Teller(lambda layer: certain(8, [6, 7])))
    rig.decode([[0, 1]] * 4, attention_s=0.5)
    wrong = [ticket for ticket in rig.engine.tickets if ticket.expert.expert >= 6 and ticket.expert.layer == 1]
    assert [ticket.state for ticket in wrong] == [TicketState.DONE, TicketState.CANCELLED]


def test_what_comes_with_its_whole_layer_is_not_copied_again_as_a_guess() -> None:
    """There are slots for a layer's two experts and for seven of the next layer: the eighth waits until one is free."""
    policy = replace(get_policy("lookahead"), decode=DecodeFetch.NEXT_LAYER)
    rig = Rig(policy, layers=3, slots=9, predictor=Teller(lambda layer: certain(8, [6, 7])))
    for _ in range(4):
        rig.decode([[3, 4]] * 3, attention_s=1.0, expert_s=1.0)
        rig.scheduler.check_integrity()
    assert {ExpertId(1, 6), ExpertId(1, 7)} <= {ticket.expert for ticket in rig.engine.tickets}


def test_what_was_said_before_holds_until_the_layer_has_been_heard() -> None:
    foresight = Foresight(Teller(lambda layer: certain(8, [1, layer + 2]), 2), GuessMode.TOP_K, SHAPE)
    assert foresight.so_far(0) == Guesses((), (1, 2), frozenset())
    assert foresight.guess(0, NOBODY, ()).spared == {ExpertId(1, 1), ExpertId(1, 3), ExpertId(2, 1), ExpertId(2, 4)}
    assert foresight.so_far(1) == Guesses((), (2, 3), frozenset({ExpertId(2, 1), ExpertId(2, 4)}))
    foresight.begin(Phase.PREFILL, np.zeros(1, dtype=np.int64))
    assert not foresight.so_far(1).spared


def test_without_a_predictor_there_are_no_guesses() -> None:
    foresight = Foresight(None, GuessMode.BUDGET, SHAPE)
    assert foresight.guess(0, NOBODY, ()) is foresight.so_far(0) is NO_GUESSES and foresight.lookahead == 0


@pytest.mark.parametrize("mode", GuessMode)
def test_a_single_layer_is_guessed_nothing_about(mode: GuessMode) -> None:
    foresight = Foresight(Teller(lambda layer: certain(8, [1])), mode, ModelShape(8, 2, (3,)))
    assert foresight.guess(3, NOBODY, ()) is foresight.so_far(3) is NO_GUESSES and not foresight.guesses_at_all


def test_demands_are_asked_for_before_anybody_hears_the_routing() -> None:
    """And guesses behind that; what is there already need not wait for either."""
    asked: list[list[ExpertId]] = []
    rig = Rig("lookahead", slots=12, predictor=Teller(lambda layer: certain(8, [6, 7])))
    teller = rig.scheduler.listener
    assert teller is not None
    rig.scheduler.begin(Phase.DECODE, 1)
    with rig.scheduler.acquire(0, [3, 4]) as lease:
        asked.append([ticket.expert for ticket in rig.engine.tickets])
        assert lease.at_once() == []  # it waits for nothing
        teller.routed(routed(0, [3, 4]))
        lease.prefetch()
        asked.append([ticket.expert for ticket in rig.engine.tickets[2:]])
        list(lease)
    rig.clock.advance(2.0)
    assert asked == [[ExpertId(0, 3), ExpertId(0, 4)], [ExpertId(1, 6), ExpertId(1, 7)]]
    with rig.scheduler.acquire(1, [6, 3]) as lease:
        assert [one.expert for one in lease.at_once()] == [6] and lease.at_once() == []
        assert [[one.expert for one in batch] for batch in lease] == [[3]]


@pytest.mark.parametrize(("policy", "listens"), [("lru", False), ("on-demand", False), ("duoserve", True)])
def test_only_policies_that_guess_have_a_listener(policy: str, listens: bool) -> None:
    teller = Teller(lambda layer: certain(8, [1]))
    assert (Rig(policy, predictor=teller).scheduler.listener is not None) is listens
    assert Rig(policy).scheduler.listener is None


def test_the_prompts_counts_decide_what_decode_gives_up() -> None:
    rig = Rig("duoserve", layers=1, slots=4, top_k=1)
    rig.scheduler.begin(Phase.PREFILL, 15)
    with rig.scheduler.acquire(0, [5, 2, 3, 1], [6, 4, 3, 2]) as lease:
        list(lease)
    rig.scheduler.end()
    rig.decode([[7]])
    assert {expert.expert for expert in rig.resident()} == {5, 2, 3, 7}
