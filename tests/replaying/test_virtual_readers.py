"""Copy threads on a virtual clock, by hand: who reads when, at which rate, and what that costs the host."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duoserve.errors import ClosedError, IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Priority, Ticket, TicketState
from duoserve.experts.virtual import VirtualClock
from duoserve.replaying.virtual_readers import HostLane, Readers, VirtualReaders

DEMAND, PREFETCH = Priority
# A read of 100 bytes takes two seconds alone; of two at once, each takes three.
PLAIN = Readers(2, alone=50.0, together=200 / 3)


def engine_of(readers: Readers = PLAIN, now: float = 10.0) -> VirtualReaders:
    return VirtualReaders(VirtualClock(now), readers, 100)


def submit(engine: VirtualReaders, number: int, priority: Priority = DEMAND) -> Ticket:
    return engine.submit(ExpertId(0, number), number, priority)


def wait_all(engine: VirtualReaders, tickets: list[Ticket]) -> None:
    while left := [ticket for ticket in tickets if not ticket.finished]:
        engine.wait(left)


def test_two_reads_share_the_disk_and_a_third_waits_for_a_thread() -> None:
    engine = engine_of()
    tickets = [submit(engine, number) for number in range(3)]
    wait_all(engine, tickets)
    assert [t.started_at for t in tickets] == pytest.approx([10, 10, 13])
    assert [t.finished_at for t in tickets] == pytest.approx([13, 13, 15])
    assert engine.now() == pytest.approx(15)


def test_a_read_that_is_joined_half_way_gets_slower() -> None:
    engine = engine_of()
    first = submit(engine, 0)
    HostLane(engine._clock, engine).launch(1.0)
    second = submit(engine, 1)
    wait_all(engine, [first, second])
    # Half of the first is left, for which it now has a third of 100 bytes a second; then the second is alone.
    assert first.finished_at == pytest.approx(11 + 1.5)
    assert second.finished_at == pytest.approx(12.5 + 1.0)


def test_what_waking_and_asking_take() -> None:
    engine = engine_of(Readers(2, 50.0, 200 / 3, queue_s=0.01, rouse_s=0.1, wake_s=0.5, notice_s=0.25))
    tickets = [submit(engine, number) for number in range(3)]
    assert engine.now() == pytest.approx(10 + 0.1 + 0.1 + 0.01)
    assert [t.state for t in tickets] == [TicketState.QUEUED] * 3
    engine.wait(tickets)
    assert [t.started_at for t in tickets[:2]] == pytest.approx([10.5, 10.6])
    assert engine.now() == pytest.approx((tickets[0].finished_at or 0.0) + 0.25)
    before = engine.now()
    assert engine.wait(tickets[:1]) == tickets[:1] and engine.now() == before


def test_threads_take_a_breath_between_reads_and_the_host_is_slower_after_sleep() -> None:
    engine = engine_of(Readers(1, 50.0, 50.0, queue_s=0.01, rouse_s=0.1, between_s=0.5, notice_s=0.25, resumed_s=0.4))
    first, second = submit(engine, 0), submit(engine, 1)
    engine.wait([first])
    assert (first.finished_at, engine.now()) == pytest.approx((12, 12.25))
    # The thread is not asleep, so the third is queued only; what the host had owed to sleep it pays once.
    third = submit(engine, 2)
    assert engine.now() == pytest.approx(12.26)
    lane = HostLane(engine._clock, engine)
    assert [lane.launch(0.1)[1] for _ in range(2)] == pytest.approx([12.76, 12.86])
    wait_all(engine, [second, third])
    assert [t.started_at for t in (second, third)] == pytest.approx([12.5, 15])


def test_demands_overtake_guesses_and_guesses_are_promoted_or_cancelled() -> None:
    engine = engine_of(Readers(1, 50.0, 50.0))
    running, guess, other, demand = (submit(engine, n, p) for n, p in enumerate((DEMAND, PREFETCH, PREFETCH, DEMAND)))
    engine.promote(other)
    assert engine.cancel(guess) and not engine.cancel(running)
    wait_all(engine, [demand, other])
    assert (guess.state, guess.finished_at) == (TicketState.CANCELLED, 10)
    assert [t.finished_at for t in (running, demand, other)] == pytest.approx([12, 14, 16])


def test_reads_that_end_beside_computing_delay_it() -> None:
    engine = engine_of()
    engine.ended_s = 0.5
    lane = HostLane(engine._clock, engine)
    ticket = submit(engine, 0)
    assert lane.launch(1.0) == pytest.approx((10, 11))
    assert lane.launch(3.0) == pytest.approx((11, 14.5))
    assert ticket.finished_at == pytest.approx(12) and lane.busy_s == pytest.approx(4.5)
    # A delay that lets another read end is made longer by that; one that the host sleeps through costs nothing.
    late = submit(engine, 1)
    assert lane.launch(1.9) == pytest.approx((14.5, 16.4))
    engine.wait([late])
    assert lane.launch(1.0) == pytest.approx((16.5, 17.5))


def test_a_thread_that_is_woken_costs_computing_unless_the_host_sleeps() -> None:
    engine, slept = engine_of(), engine_of()
    engine.roused_s = slept.roused_s = 0.5
    submit(engine, 0)
    assert HostLane(engine._clock, engine).launch(1.0) == pytest.approx((10, 11.5))
    slept.wait([submit(slept, 0)])
    assert HostLane(slept._clock, slept).launch(1.0) == pytest.approx((12, 13))


def test_an_expert_is_fresh_once() -> None:
    engine = engine_of()
    engine.wait([submit(engine, 3)])
    assert [engine.touch(ExpertId(0, number), number) for number in (3, 3, 4)] == [True, False, False]


def test_foreign_tickets_and_closed_engines_are_refused() -> None:
    engine = engine_of()
    foreign = Ticket(ExpertId(0, 0), 0, DEMAND, 100, 10.0)
    with pytest.raises(IntegrityError, match="none of which"):
        engine.wait([foreign])
    running = [submit(engine, number) for number in range(2)]
    queued = submit(engine, 2)
    engine.close()
    assert queued.state is TicketState.CANCELLED and all(t.state is TicketState.DONE for t in running)
    with pytest.raises(ClosedError):
        submit(engine, 3)


@given(
    st.lists(st.tuples(st.sampled_from(["submit", "compute", "wait"]), st.floats(0.01, 5.0)), max_size=30),
    st.integers(1, 3),
)
def test_no_read_beats_the_disk_and_none_is_lost(steps: list[tuple[str, float]], threads: int) -> None:
    engine = VirtualReaders(VirtualClock(), Readers(threads, 50.0, 80.0, wake_s=0.01, notice_s=0.01), 100)
    engine.roused_s, engine.ended_s = 0.2, 0.1
    tickets: list[Ticket] = []
    for what, seconds in steps:
        if what == "submit":
            tickets.append(submit(engine, len(tickets)))
        elif what == "compute":
            before = engine.now()
            engine.compute(seconds)
            assert seconds * 0.999 <= engine.now() - before <= seconds + 0.3 * len(tickets) + 1e-9
        elif tickets:
            engine.wait(tickets[-1:])
    wait_all(engine, tickets)
    ends = sorted(ticket.finished_at or 0.0 for ticket in tickets)
    assert all(end >= 100 * (at + 1) / 80.0 * 0.999 for at, end in enumerate(ends))
    assert all((t.finished_at or 0) - (t.started_at or 0) >= 2 * 0.999 for t in tickets)


def test_a_read_is_warm_where_the_slot_was_used_just_before() -> None:
    engine = engine_of(Readers(1, 50.0, 50.0, warm=2.0))

    def seconds(slot: int) -> float:
        ticket = submit(engine, slot)
        engine.wait([ticket])
        assert ticket.started_at is not None and ticket.finished_at is not None
        return ticket.finished_at - ticket.started_at

    # Two slots in turn stay warm, a third one makes the one before the last cold.
    assert [seconds(slot) for slot in (0, 1, 0, 1, 2, 0, 2)] == pytest.approx([2, 2, 1, 1, 2, 2, 1])
    engine.touch(ExpertId(0, 5), 5)
    assert [seconds(slot) for slot in (2, 0)] == pytest.approx([1, 2])
    cancelled = [submit(engine, slot) for slot in (0, 2)][1]
    assert engine.cancel(cancelled) and not engine._warm
