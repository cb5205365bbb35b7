"""Replays: bookkeeping by hand, bounds that no policy may pass, and the oracle at the end of the scale."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from duoserve.config import Phase
from duoserve.errors import MemoryBudgetError
from duoserve.kernels import by_demand
from duoserve.replaying.foreseen import Belady, Future
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from duoserve.replaying.replay import Watcher, layer_belady_bytes, least_bytes, oracle_of, replay
from duoserve.replaying.scored import Score, ScoredPredictor
from duoserve.scheduling.policies import POLICIES, get_policy
from duoserve.scheduling.routing import Routing
from duoserve.scheduling.scheduler import Scheduler
from duoserve.scheduling.source import Lease
from tests.scheduling.fortune import Teller, certain, generous_link, routed
from tests.traces.drawn import drawn_trace, trace_of

SIZES = LayerSizes("small", 1_000_000, 8, 1_000_000, 64)
FAST = Machine(Hardware("fast", 1e12, 1e12, 1e15, 0.0, 1e-5), SIZES)
EVEN = Machine(Hardware("even", 1e10, 1e11, 1e14, 0.0, 1e-4), SIZES)
SLOW = Machine(Hardware("slow", 1e9, 1e12, 1e15, 0.0, 1e-6), SIZES)
STREAMING = [name for name in POLICIES if name != "resident"]


def test_a_request_by_hand() -> None:
    """One layer, slots for all: the prompt brings its two experts, the second token one more, the third none."""
    trace = trace_of([(2, [[0, 1], [0, 1], [0, 2], [2, 1]])])
    machine = Machine(Hardware("round", 1e6, 1e9, 1e15, 0.5, 2.0), LayerSizes("round", 10**6, 8, 0, 0))
    run = replay(trace, get_policy("lru"), machine, 8)
    # Attention takes 2 s, a copy 1.5 s, an expert 0.001 s. The two come one after the other from the routing on.
    assert run.ttft_s == [pytest.approx(2 + 3 + 0.001)]
    assert run.itl_s == [pytest.approx(2 + 1.5 + 0.001), pytest.approx(2 + 0.002)]
    assert run.prefill_stall_s == pytest.approx(2.999) and run.decode_stall_s == pytest.approx(1.499)
    assert (run.hits, run.misses) == (3, 1) and run.bytes.demanded == 10**6
    assert run.total_s == pytest.approx(sum(run.ttft_s) + sum(run.itl_s))


@pytest.mark.parametrize("slots", [8, 24, 96])
@pytest.mark.parametrize("policy", STREAMING)
def test_no_policy_passes_the_bounds(policy: str, slots: int) -> None:
    trace = drawn_trace()
    predictor = Teller(lambda layer: certain(16, [layer, 2 * layer]))
    run = replay(trace, get_policy(policy), EVEN, slots, predictor=predictor)
    assert (len(run.ttft_s), run.num_tokens, run.hits + run.misses) == (3, 120, 120 * 6 * 2)
    compute_s = 6 * (EVEN.attention_s(1, 12) + 2 * EVEN.one_token_s)
    assert min(run.itl_s) >= compute_s * 0.999
    assert run.tpot_s is not None and run.tpot_s >= run.bytes.total / run.num_tokens / EVEN.hardware.link * 0.999
    assert run.decode_stall_s == pytest.approx(sum(run.itl_s) - 120 * compute_s, rel=0.02, abs=1e-3)


def test_more_slots_and_faster_links_are_never_slower() -> None:
    trace = drawn_trace()
    runs = [replay(trace, get_policy("duoserve"), machine, slots) for machine in (SLOW, FAST) for slots in (12, 48, 96)]
    times = [run.total_s for run in runs]
    assert times[:3] == sorted(times[:3], reverse=True) and times[3:] == sorted(times[3:], reverse=True)
    assert max(times[3:]) < min(times[:3])


def test_resident_needs_all_slots() -> None:
    with pytest.raises(MemoryBudgetError, match="96"):
        replay(drawn_trace(), get_policy("resident"), EVEN, 95)


@pytest.mark.parametrize("machine", [SLOW, EVEN, FAST], ids=lambda machine: machine.hardware.name)
@pytest.mark.parametrize("slots", [12, 24, 48])
def test_nothing_is_faster_than_the_oracle(slots: int, machine: Machine) -> None:
    trace = drawn_trace()
    policy, future = oracle_of(trace)
    best = replay(trace, policy, machine, slots, predictor=future)
    for name in STREAMING:
        other = replay(trace, get_policy(name), machine, slots, predictor=Teller(lambda layer: certain(16, [3])))
        assert best.tpot_s is not None and other.tpot_s is not None and best.tpot_s <= other.tpot_s
    assert best.score is not None and best.score.recall == 1.0
    # Slots for one token's experts alone leave none for those that bypass the cache.
    assert slots == 12 or best.bytes.total / best.num_tokens < 1.15 * layer_belady_bytes(trace, machine, slots)


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("slots", [12, 24, 48])
def test_nothing_copies_less_than_the_least(slots: int, name: str) -> None:
    """Not even where the prompt has brought all that decode steps want."""
    for trace in (drawn_trace(), trace_of([(2, [[3, 5]] * 9)], layers=6)):
        done = replay(trace, get_policy(name), EVEN, slots)
        assert done.bytes.total / done.num_tokens >= least_bytes(trace, EVEN, slots)


class Ponderer(Teller):
    """Thinks for ``seconds`` about each layer it hears of, by a clock of its own, and expects nothing."""

    def __init__(self, seconds: float) -> None:
        super().__init__(lambda layer: np.zeros(8))
        self.seconds, self.clock = seconds, 0.0

    def observe(self, routing: Routing) -> None:
        self.clock += self.seconds


@pytest.mark.parametrize(
    ("course", "hidden"),
    [([[0, 1], [2, 3], [4, 5], [6, 7]], True), ([[0, 1]] * 4, False)],
    ids=["all misses", "all hits"],
)
def test_what_a_predictor_takes_passes_while_the_demands_are_copied(course: list[list[int]], hidden: bool) -> None:
    """Where there are none, while what is there is computed: only what it takes beyond that is seen."""
    trace, slots = trace_of([(1, course)], layers=3), 6
    compute_s, copy_s = 2 * EVEN.one_token_s, EVEN.hardware.copy_s(EVEN.sizes.expert_bytes)
    teller = Ponderer(3 * compute_s)
    assert compute_s < teller.seconds < copy_s
    thoughtful = replay(trace, get_policy("duoserve"), EVEN, slots, predictor=teller, host_clock=lambda: teller.clock)
    thoughtless = replay(trace, get_policy("duoserve"), EVEN, slots)
    assert thoughtful.misses == (18 if hidden else 0)
    beyond_s = 0.0 if hidden else 3 * (teller.seconds - compute_s)
    assert thoughtful.itl_s == pytest.approx([itl_s + beyond_s for itl_s in thoughtless.itl_s], rel=1e-6)


@pytest.mark.parametrize(("on_cpu", "itl_s"), [(False, 3.0), (True, 3.5)])
def test_a_demand_waits_for_all_of_a_wrong_guess_where_copy_threads_read(on_cpu: bool, itl_s: float) -> None:
    """And on a device's link, which can be divided, for a piece. A copy takes 1 s, a layer's attention 0.5 s.

    Layer 1 is routed at 2 s; the copy of 7, which is predicted of it, begins at 1.5 s behind the demand of layer 0.
    """
    hardware = Hardware("round", 1e8, 1e30, 1e30, 0.0, 0.5, host_computes=on_cpu)
    machine, teller = Machine(hardware, LayerSizes("large", 10**8, 8, 0, 0)), Teller(lambda layer: certain(8, [7]))
    with generous_link():
        run = replay(trace_of([(1, [[0], [1]])], layers=2), get_policy("lookahead"), machine, 4, predictor=teller)
    assert run.itl_s == [pytest.approx(itl_s, abs=0.01)]


def test_a_replay_asks_for_a_layers_experts_in_the_order_in_which_a_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, asked = drawn_trace(), []
    acquire = Scheduler.acquire

    def noted(scheduler: Scheduler, layer: int, experts: list[int], counts: list[int]) -> Lease:
        asked.append(dict(zip(experts, counts, strict=True)))
        return acquire(scheduler, layer, experts, counts)

    monkeypatch.setattr(Scheduler, "acquire", noted)
    replay(trace, get_policy("lru"), EVEN, 24)
    steps = [request.routing(step) for request in trace for step in range(request.num_steps)]
    wanted = [Counter(routing.topk_ids_TK.ravel().tolist()) for routings in steps for routing in routings]
    assert [list(rows) for rows in asked] == [by_demand(rows) for rows in wanted] and asked == wanted


def test_the_lanes_can_be_watched() -> None:
    copies: list[tuple[float, float, int]] = []
    work: list[tuple[float, float, int]] = []
    run = replay(
        drawn_trace(requests=1),
        get_policy("lru"),
        EVEN,
        24,
        watcher=Watcher(lambda *copy: copies.append(copy), lambda *job: work.append(job)),
    )
    assert {layer for _, _, layer in work} == set(range(6))
    assert all(a[1] <= b[0] + 1e-12 for a, b in pairwise(copies))
    assert sum(nbytes for _, _, nbytes in copies) >= run.bytes.total
    assert max(stop for _, stop, _ in work) == pytest.approx(run.total_s)


class TestFuture:
    TRACE = trace_of([(1, [[0, 1], [2, 3], [0, 1]])], layers=2)

    def test_it_says_what_comes_and_nothing_behind_the_end(self) -> None:
        _, future = oracle_of(self.TRACE)
        future.begin(Phase.PREFILL, np.zeros(1))
        assert np.flatnonzero(future.predict(0)).tolist() == [0, 1]
        future.observe(routed(0, [0, 1]))
        assert np.flatnonzero(future.predict(1)).tolist() == [0, 1]
        assert np.flatnonzero(future.predict(0)).tolist() == [2, 3]
        future.begin(Phase.DECODE, np.zeros(1))
        future.begin(Phase.DECODE, np.zeros(1))
        future.observe(routed(1, [0, 1]))
        assert not future.predict(0).any()

    def test_belady_ranks_by_the_next_use(self) -> None:
        future = Future(list(self.TRACE), (0, 1), 8)
        ranking = future.ranking(2, 8)
        assert isinstance(ranking, Belady)
        ranking.begin(Phase.PREFILL, 1)
        ranking.used(0, [0, 1], [1, 1])
        values = ranking.values[0]
        assert values[2] == values[3] > values[0] == values[1] > values[7]


class TestScore:
    def test_counts(self) -> None:
        score = Score()
        for said, chosen in (([1, 2], [2, 1]), ([1, 2], [1, 3]), ([0, 4], [5, 6])):
            score.note(said, chosen)
        assert (score.recall, score.exact_share, score.half_share) == (3 / 6, 1 / 3, 2 / 3)
        assert Score().recall is None

    def test_prompts_and_what_was_not_predicted_are_left_out(self) -> None:
        scored = ScoredPredictor(Teller(lambda layer: certain(8, [1, 2])))
        for phase in (Phase.PREFILL, Phase.DECODE):
            scored.begin(phase, np.zeros(1))
            scored.observe(routed(0, [1, 2]))
            scored.predict(1)
            scored.observe(routed(1, [2, 5]))
        assert (scored.score.layers, scored.score.chosen, scored.score.found) == (1, 2, 1)
