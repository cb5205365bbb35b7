"""Whom to start, how far to take a prefill, whom to refuse: on plain data and virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.batching import PATIENCE_S, STEP_S, Asked, Batching, Coming, Going, Load
from duoserve.cost import Costs
from duoserve.service import Objectives, ServiceSettings

LAYERS = 10
SLO, FCFS = ServiceSettings(max_batch=4), ServiceSettings(max_batch=4, scheduler="fcfs")


def batching(settings: ServiceSettings = SLO, *, step_s: float = 0.01, layer_s: float = 0.01) -> Batching:
    """A decode step takes ``step_s`` and a tenth of it for each request, a layer ``layer_s`` for each 100 tokens."""
    costs = Costs()
    for size in (1, 11):
        costs.note_decode(size, step_s * (0.9 + 0.1 * size))
        costs.note_prefill(100 * size, 1, layer_s * size)
    return Batching(settings, costs, LAYERS)


def asked(arrived: float = 0.0, prompt: int = 100, room: int = 128, ttft_s: float | None = None) -> Asked:
    return Asked(arrived, prompt, room, Objectives(ttft_s))


def going(tpot_s: float | None = None, last_token: float = 0.0, left: int = 10) -> Going:
    return Going(last_token, left, 128, tpot_s)


def load(waiting: Sequence[Asked] = (), running: Sequence[Going] = (), free: int = 10_000, **more: object) -> Load:
    return Load(more.pop("now", 0.0), waiting, running, free, **more)  # type: ignore[arg-type]


def test_the_least_slack_goes_first_and_arrival_counts_for_nothing_else() -> None:
    waiting = [asked(0.0, ttft_s=9.0), asked(0.1, ttft_s=1.0), asked(0.2, prompt=300, ttft_s=1.05), asked(0.3)]
    assert batching().order(load(waiting, now=0.5)) == [2, 1, 0, 3]
    assert batching(FCFS).order(load(waiting, now=0.5)) == [0, 1, 2, 3]


def test_what_is_late_already_waits_for_what_can_still_be_in_time() -> None:
    waiting = [asked(0.0, ttft_s=0.5), asked(0.9, ttft_s=1.0)]
    assert batching().order(load(waiting, now=1.0)) == [1, 0]


def test_waiting_prompts_share_a_pass_as_long_as_all_are_in_time() -> None:
    waiting = [asked(0.0, ttft_s=0.25), asked(0.0, ttft_s=2.0), asked(0.0, prompt=500, ttft_s=2.0)]
    assert batching().start(load(waiting)) == [0, 1]  # 0.2 s for both; the third would make it 0.7 s
    assert batching(FCFS).start(load(waiting)) == [0, 1, 2]


def test_the_kv_cache_and_the_batch_bound_what_starts() -> None:
    waiting = [asked(room=128), asked(room=512), asked(room=128)]
    assert batching().start(load(waiting, free=300)) == [0, 2]
    assert batching(FCFS).start(load(waiting, free=300)) == [0]
    assert len(batching().start(load([asked()] * 9))) == 4
    assert len(batching().start(load([asked()] * 9, [going()] * 3))) == 1


def test_nobody_overtakes_one_whose_patience_has_ended() -> None:
    waiting = [asked(0.0, room=512), asked(1.0, room=128)]
    assert batching().start(load(waiting, free=300, now=PATIENCE_S - 1)) == [1]
    assert batching().start(load(waiting, free=300, now=PATIENCE_S)) == []


def test_the_batch_grows_only_as_far_as_later_tokens_stay_in_time() -> None:
    waiting = [asked()] * 4
    assert len(batching().start(load(waiting, [going(0.0121)]))) == 2  # three take 0.012 s a step
    assert len(batching().start(load(waiting, [going(0.001)]))) == 3  # which no batch could keep


def test_a_slice_ends_in_time_for_the_next_decode_step() -> None:
    coming, slow = Coming(100, 1, LAYERS), batching(layer_s=0.004)
    assert slow.layers(load(running=[going(0.025)], coming=coming), decoded=False) == 3  # 0.025 - 0.01 = 0.015 s
    assert slow.layers(load(running=[going(0.025)], coming=coming, now=0.012), decoded=False) == 0
    assert slow.layers(load(running=[going(0.025)], coming=coming, now=0.9), decoded=True) == 1
    assert slow.layers(load(running=[going()], coming=coming), decoded=False) == LAYERS
    assert Batching(FCFS, slow.costs, LAYERS).layers(load(running=[going(0.025)], coming=coming), decoded=False) == 10


def test_no_slice_is_long_and_the_first_is_one_layer() -> None:
    coming = Coming(1000, 1, LAYERS)
    assert batching(layer_s=0.001).layers(load(coming=coming), decoded=False) == STEP_S / 0.01
    assert batching(layer_s=1.0).layers(load(coming=coming), decoded=False) == 1
    assert Batching(SLO, Costs(), LAYERS).layers(load(coming=coming), decoded=False) == 1


def test_a_request_is_refused_for_what_is_ahead_of_it() -> None:
    one = batching()
    assert one.refusal(asked(ttft_s=0.15), load()) is None
    refused = one.refusal(asked(ttft_s=0.15), load([asked()] * 2))
    assert refused is not None and refused.retry_after_s == pytest.approx(0.15, rel=0.01) and "0.3 s" in refused.why
    assert one.refusal(asked(ttft_s=0.15), load(coming=Coming(100, 1, 9))) is not None
    full = load(running=[going(left=50)] * 4)
    refused = one.refusal(asked(ttft_s=0.15), full)
    assert refused is not None and refused.retry_after_s == pytest.approx(50 * 0.013 - 0.05, rel=0.01)
    assert one.refusal(asked(), full) is None
    assert one.refusal(Asked(0.0, 1, 1, Objectives(None, 0.005)), load()) is not None
    assert Batching(SLO, Costs(), LAYERS).refusal(asked(ttft_s=0.001), full) is None  # nothing has been measured


@dataclass
class Simulated:
    """A service on a virtual clock that does what ``Batching`` says; costs are exactly as expected."""

    batching: Batching
    room: int = 1024
    now: float = 0.0
    waiting: list[tuple[int, Asked]] = field(default_factory=list)
    running: list[Going] = field(default_factory=list)
    coming: Coming | None = None
    inside: list[Asked] = field(default_factory=list)
    started: dict[int, float] = field(default_factory=dict)
    decoded: bool = False

    def run(self, arrivals: Sequence[Asked], until: float) -> None:
        todo = list(enumerate(arrivals))
        while self.now < until:
            while todo and todo[0][1].arrived <= self.now:
                self.waiting.append(todo.pop(0))
            self._step()

    def _load(self) -> Load:
        used = sum(one.room for one in (*self.running, *self.inside))
        return Load(self.now, [one for _, one in self.waiting], self.running, self.room - used, self.coming)

    def _step(self) -> None:
        if self.coming is None and self.waiting:
            chosen = self.batching.start(self._load())
            pairs = [self.waiting[place] for place in chosen]
            self.waiting = [pair for pair in self.waiting if pair not in pairs]
            self.started |= {number: self.now for number, _ in pairs}
            self.inside = [one for _, one in pairs]
            if pairs:
                self.coming = Coming(sum(one.num_prompt for one in self.inside), len(pairs), LAYERS)
        layers = self.batching.layers(self._load(), self.decoded or not self.running) if self.coming else 0
        if self.coming and layers:
            self._slice(self.coming, layers)
        elif self.running:
            self._decode()
        else:
            self.now += 0.01

    def _slice(self, coming: Coming, layers: int) -> None:
        self.decoded = False
        self.now += layers * self.batching.costs.layer_s(coming.num_tokens)
        self.coming = coming._replace(layers_left=coming.layers_left - layers)
        if not self.coming.layers_left:
            self.running += [Going(self.now, 5, one.room, one.objectives.tpot_s) for one in self.inside]
            self.coming, self.inside = None, []

    def _decode(self) -> None:
        self.decoded = True
        self.now += self.batching.costs.decode_s(len(self.running))
        later = [one._replace(left=one.left - 1, last_token=self.now) for one in self.running]
        self.running = [one for one in later if one.left]


STRANGERS = st.lists(
    st.builds(
        Asked,
        st.just(0.0),
        st.integers(1, 400),
        st.sampled_from([64, 256, 1024]),
        st.builds(Objectives, st.sampled_from([None, 0.01, 0.5]), st.sampled_from([None, 0.001, 0.02])),
    ),
    min_size=1,
    max_size=8,
)


@given(victim=STRANGERS, crowd=STRANGERS)
@settings(max_examples=8, deadline=None)
def test_no_request_waits_for_ever(victim: list[Asked], crowd: list[Asked]) -> None:
    """One comes at 1 s, and twice as many others as can be served never stop coming: its turn comes all the same."""
    others = [crowd[n % len(crowd)]._replace(arrived=0.1 * n + 0.05) for n in range(250)]
    arrivals = sorted([victim[0]._replace(arrived=1.0), *others], key=lambda one: one.arrived)
    service = Simulated(batching())
    service.run(arrivals, until=25.0)
    number = [one.arrived for one in arrivals].index(1.0)
    ahead = sum(one.arrived <= 1.0 for one in arrivals)
    assert number in service.started
    assert service.started[number] <= 1.0 + PATIENCE_S + 1.0 * ahead


def test_at_the_same_load_more_requests_are_in_time_than_first_come_first_served() -> None:
    """Bursts of long prompts without hurry among short ones with some."""
    arrivals = []
    for burst in range(10):
        arrivals += [Asked(burst * 2.0, 400, 128, Objectives(5.0)) for _ in range(3)]
        arrivals += [Asked(burst * 2.0 + 0.05 * n, 20, 128, Objectives(0.6)) for n in range(8)]
    arrivals.sort(key=lambda one: one.arrived)

    def in_time(settings: ServiceSettings) -> int:
        service = Simulated(batching(settings))
        service.run(arrivals, until=30.0)
        assert len(service.started) == len(arrivals)
        takes_s = [LAYERS * service.batching.costs.layer_s(one.num_prompt) for one in arrivals]
        due = [one.arrived + (one.objectives.ttft_s or 0) for one in arrivals]
        return sum(at + takes_s[number] <= due[number] for number, at in service.started.items())

    assert in_time(SLO) >= 1.5 * in_time(FCFS)
