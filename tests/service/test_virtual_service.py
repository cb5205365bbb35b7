"""Whole services on virtual time: nobody starves, who runs keeps its objective, and slack is worth something."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.batching.next_work import PATIENCE_S
from duoserve.interface import Objectives, ServiceSettings
from duoserve.request import Request
from tests.service.virtual_service import Arrival, Rates, VirtualPasses, attained, serve

# The costs are lines, so what is expected of work is what it takes.
LINEAR = Rates(num_layers=10, pass_s=0.002, token_s=1e-4, step_s={1: 0.010, 101: 0.110})
# A small model from a disk: a pass over the experts costs more than its tokens, a large batch little more than a small.
DISK = Rates(6, 4.3e-3, 2e-5, {1: 11.6e-3, 2: 16.8e-3, 4: 25.2e-3, 8: 37.2e-3, 12: 42.5e-3, 16: 49e-3})
SLO, FCFS = ServiceSettings(max_waiting=4096), ServiceSettings(max_waiting=4096, scheduler="fcfs")


@st.composite
def strangers(draw: st.DrawFn) -> Arrival:
    hopes = Objectives(draw(st.sampled_from([None, 0.01, 0.5])), draw(st.sampled_from([None, 0.001, 0.02])))
    return Arrival(0.0, draw(st.integers(1, 400)), draw(st.sampled_from([1, 6, 40])), hopes)


@given(victim=strangers(), crowd=st.lists(strangers(), min_size=1, max_size=8))
@example(victim=Arrival(0, 100, 6), crowd=[Arrival(0, 200, 6, Objectives(0.5))])
@example(victim=Arrival(0, 100, 6, Objectives(0.01)), crowd=[Arrival(0, 200, 40, Objectives(0.5, 0.012))])
@example(
    victim=Arrival(0, 1, 1), crowd=[*[Arrival(0, 1, 1)] * 2, Arrival(0, 1, 6), Arrival(0, 374, 1, Objectives(0.5))]
)
@settings(max_examples=12, deadline=None)
def test_no_request_waits_for_ever(victim: Arrival, crowd: list[Arrival]) -> None:
    """One comes at 1 s, and more others than can be served never stop coming: its turn comes all the same."""
    others = [crowd[n % len(crowd)]._replace(at=0.05 * n) for n in range(600)]
    arrivals = sorted([victim._replace(at=1.001), *others], key=lambda one: one.at)
    served = serve(arrivals, LINEAR, ServiceSettings(max_batch=4, max_waiting=4096), room=1024, until=30.0)
    place = [one.at for one in arrivals].index(1.001)
    first_token = served[place].first_token
    assert first_token is not None
    assert first_token <= 1.0 + PATIENCE_S + 0.7 * (place + 1)  # those ahead take a place each


@given(
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 300)), min_size=2, max_size=12),
    gap_s=st.sampled_from([0.0, 0.2, 1.0]),
    scheduler=st.sampled_from(["slo", "fcfs"]),
)
@settings(max_examples=12, deadline=None)
def test_answers_that_outgrow_their_room_all_come_to_their_end(
    lengths: list[tuple[int, int]], gap_s: float, scheduler: str
) -> None:
    """In a cache that holds little more than the largest of them."""
    hopes = Objectives(0.5, 0.02)
    arrivals = [Arrival(gap_s * n, *sizes, hopes if n % 2 else Objectives()) for n, sizes in enumerate(lengths)]
    how = ServiceSettings(max_batch=4, max_waiting=4096, scheduler=scheduler, answer_room=16)
    served = serve(arrivals, LINEAR, how, room=512)
    assert [len(request.output_ids) for request in served] == [answer for _, answer in lengths]


@st.composite
def loads(draw: st.DrawFn) -> list[Arrival]:
    dice = random.Random(draw(st.integers(0, 2**31)))
    goals = draw(st.lists(st.sampled_from([None, 0.0108, 0.013, 0.02, 0.05]), min_size=1, max_size=4))
    at, coming = 0.0, []
    for _ in range(40):
        at += dice.expovariate(draw(st.sampled_from([2.0, 10.0, 50.0])))
        hopes = Objectives(dice.choice([None, 0.3, 2.0]), dice.choice(goals))
        coming.append(Arrival(at, dice.randint(1, 300), dice.randint(1, 40), hopes))
    return coming


@given(loads())
@settings(max_examples=25, deadline=None)
def test_whoever_has_a_token_gets_the_others_in_time(coming: list[Arrival]) -> None:
    """However many others come, as long as nobody's patience has ended."""
    for request in serve(coming, LINEAR, SLO):
        assert request.first_token is not None and request.last_token is not None and request.arrived is not None
        goal, others = request.objectives.tpot_s, len(request.output_ids) - 1
        if goal is not None and max(one.at for one in coming) - request.arrived < PATIENCE_S / 2:
            assert request.last_token - request.first_token <= others * goal + 1e-9


def mix(rate: float, seed: int, together: int = 1, requests: int = 150) -> list[Arrival]:
    """Prompts and answers of mixed lengths, at ``rate`` a second, ``together`` at once; the same hopes for all."""
    dice, at, coming = random.Random(seed), 0.0, list[Arrival]()
    hopes = Objectives(60 * DISK.decode_s(1), 3 * DISK.decode_s(1))
    while len(coming) < requests:
        at += dice.expovariate(rate / together)
        for _ in range(together):
            coming.append(Arrival(at, _length(dice, 48, 768), _length(dice, 24, 96), hopes))
    return coming


def _length(dice: random.Random, median: int, most: int) -> int:
    return max(2, min(most, round(dice.lognormvariate(0, 0.8) * 0.75 * median)))


@pytest.mark.parametrize(("rate", "together"), [(6.0, 1), (4.0, 5)], ids=["poisson", "burst"])
def test_at_the_same_load_more_requests_are_in_time_than_first_come_first_served(rate: float, together: int) -> None:
    by_slack, in_order = (attained(serve(mix(rate, 3, together), DISK, how)) for how in (SLO, FCFS))
    assert 0 < in_order < 1.0
    assert by_slack > in_order + 0.2


def goodput(settings: ServiceSettings, rates: Sequence[float]) -> float:
    """The highest of ``rates`` at which, as at all below, nine in ten were in time."""
    best = 0.0
    for rate in rates:
        if attained(serve(mix(rate, 1), DISK, settings)) < 0.9:
            break
        best = rate
    return best


def test_goodput_is_half_as_much_again_as_first_come_first_served() -> None:
    rates = [2.5 * 1.1**n for n in range(12)]
    in_order, by_slack = goodput(FCFS, rates), goodput(SLO, rates)
    assert rates[0] <= in_order < rates[-1]
    assert by_slack >= 1.45 * in_order


def test_a_service_without_objectives_serves_in_order() -> None:
    coming = [one._replace(objectives=Objectives()) for one in mix(8.0, 2)]
    first = [request.first_token or 0.0 for request in serve(coming, DISK, SLO)]
    assert first == sorted(first)


class ColdPasses(VirtualPasses):
    """The first request's decode steps take twenty times as long as all later ones."""

    def decode(self, requests: Sequence[Request]) -> Tensor:
        if any(request.number == 0 for request in requests):
            self._clock.now += 19 * self._rates.decode_s(len(requests))
        return super().decode(requests)


def test_a_cold_start_does_not_close_a_strict_service_for_good() -> None:
    strict = ServiceSettings(admission="strict", objectives=Objectives(None, 0.05))
    coming = [Arrival(float(n), 50, 10, strict.objectives) for n in range(60)]
    admitted = [bool(request.output_ids) for request in serve(coming, LINEAR, strict, passes=ColdPasses)]
    assert admitted[0] and not all(admitted)
    assert all(admitted[30:])
