"""Machines whose parts were timed, and the replays that run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import inf

import pytest

from duoserve.experts.virtual import VirtualClock
from duoserve.replaying.hardware import Hardware, LayerSizes
from duoserve.replaying.host_time import HostTime, UntimedEngine
from duoserve.replaying.replay import replay
from duoserve.replaying.virtual_readers import Readers, VirtualReaders
from duoserve.scheduling.policies import get_policy
from reality.timed_machine import PassTimes, TimedMachine
from tests.scheduling.fortune import Teller, certain
from tests.traces.drawn import trace_of

# A read takes 2 s alone and 3 s of two at once.
READERS = Readers(2, alone=50.0, together=200 / 3, notice_s=0.25)
PROMPT, STEP = (
    PassTimes(before=4.0, rest=8.0, fresh=0.5),
    PassTimes(before=1.0, rest=2.0, fresh=0.25, roused=0.01, ended=0.5),
)
SIZES = LayerSizes("round", 100, 8, 0, 0)


def machine_of(readers: Readers = READERS, step: PassTimes = STEP) -> TimedMachine:
    hardware = Hardware("timed", inf, inf, inf, 0.0, 0.0, host_computes=True, readers=readers)
    return TimedMachine(hardware, SIZES, PROMPT, step, ((1, 0.1), (2, 0.2), (4, 0.8)), 0.05)


def test_an_expert_takes_what_lies_between_the_counts_that_were_timed() -> None:
    machine = machine_of()
    assert [machine.expert_s(tokens) for tokens in (1, 2, 3, 4, 6)] == pytest.approx([0.1, 0.2, 0.5, 0.8, 1.4])
    assert machine.one_token_s == pytest.approx(0.1)


def test_a_request_by_hand() -> None:
    """One layer: the prompt brings two experts, which two threads read, the next token one more, the last none."""
    trace = trace_of([(2, [[0, 1], [0, 1], [0, 2], [2, 1]])])
    run = replay(trace, get_policy("lru"), machine_of(), 8)
    # The reads end together; the host notices one first, computes both in one launch, fresh as they are.
    assert run.ttft_s == [pytest.approx(4 + 3 + 0.25 + 0.05 + 2 * (0.2 + 0.5) + 8)]
    # Expert 0 is computed beside the read of expert 2, whose thread was woken; the host sleeps when that ends.
    beside = 0.15 + 0.01
    assert run.itl_s[0] == pytest.approx(1 + 2 + 0.25 + 0.05 + 0.1 + 0.25 + 2)
    assert run.itl_s[1] == pytest.approx(1 + 0.05 + 0.2 + 2)
    assert run.decode_stall_s == pytest.approx(2 - beside + 0.25)
    assert (run.hits, run.misses) == (3, 1)


def test_what_lay_in_its_slot_when_a_prompt_comes_is_in_no_cache() -> None:
    trace = trace_of([(2, [[0, 1], [0, 1], [0, 2]])] * 2)
    warm, cold = (
        replay(trace, get_policy("lru"), machine_of().with_times(replace(PROMPT, cold=cold_s), STEP), 8)
        for cold_s in (0.0, 0.3)
    )
    assert [a - b for a, b in zip(cold.ttft_s, warm.ttft_s, strict=True)] == pytest.approx([0, 2 * 0.3])
    assert cold.itl_s == pytest.approx(warm.itl_s)


def test_listening_takes_its_time() -> None:
    """A policy that hears of the routing is told; one whose predictor wants scores waits for these too."""
    trace = trace_of([(1, [[0, 1], [0, 1], [0, 1]])], layers=2)
    step = PassTimes(hearing=0.5, scores=0.25)
    deaf = replay(trace, get_policy("lru"), machine_of(step=step), 16)
    tellers = [Teller(lambda layer: certain(8, [0, 1])) for _ in range(2)]
    tellers[1].lookahead = 1
    hearing, scored = (
        replay(trace, get_policy("duoserve"), machine_of(step=step), 16, predictor=teller) for teller in tellers
    )
    assert hearing.itl_s[-1] - deaf.itl_s[-1] == pytest.approx(2 * 0.5)
    assert scored.itl_s[-1] - deaf.itl_s[-1] == pytest.approx(2 * 0.75)


def test_resident_begins_with_all_experts_in_slots() -> None:
    run = replay(trace_of([(2, [[0, 1], [0, 1], [0, 2]])]), get_policy("resident"), machine_of(), 8)
    assert run.misses == 0 and run.prefill_stall_s == 0
    # Expert 2, which the prompt had no use for, is computed for the first time.
    assert run.itl_s == [pytest.approx(1 + 0.05 + 0.2 + 0.25 + 2)]


def test_the_hosts_work_takes_the_time_that_a_clock_says() -> None:
    """The clock ticks whenever it is read: seconds are then how often the host's work is begun or interrupted."""
    trace = trace_of([(2, [[0, 1], [0, 1], [0, 1], [0, 1]])])
    still = replay(trace, get_policy("lru"), machine_of(), 8)
    once, thrice = (
        replay(trace, get_policy("lru"), machine_of(), 8, host_clock=ticking(tick)).itl_s[-1] - still.itl_s[-1]
        for tick in (0.01, 0.03)
    )
    assert once > 0.04 and thrice == pytest.approx(3 * once)


def ticking(tick: float) -> Callable[[], float]:
    ticks = count()
    return lambda: next(ticks) * tick


def test_the_engines_own_work_takes_no_time_of_the_host() -> None:
    clock, read = VirtualClock(), iter([0.0, 1.0, 5.0, 7.0])
    host = HostTime(clock, lambda: next(read))
    engine = UntimedEngine(VirtualReaders(clock, READERS, 100), host)
    with host:
        assert engine.now() == 1.0  # a second had passed; while the engine worked, four more
    assert clock.now == 1.0 + 2.0
    assert engine.wait([]) == [] and clock.now == 3.0
