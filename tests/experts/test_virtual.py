"""The link on a virtual clock: copies one at a time, in order or in any other, none of them before its time."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duoserve.errors import ClosedError, CopyError, IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.tickets import Priority, Ticket, TicketState
from duoserve.experts.virtual import VirtualClock, VirtualCopyEngine
from tests.helpers.fakes import SMALL, ArrayStore

DEMAND, PREFETCH = Priority


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(10.0)


@pytest.fixture
def engine(clock: VirtualClock) -> VirtualCopyEngine:
    """Every copy takes two seconds."""
    return VirtualCopyEngine(clock, lambda nbytes: 2.0)


def submit(engine: VirtualCopyEngine, number: int, priority: Priority = DEMAND) -> Ticket:
    return engine.submit(ExpertId(0, number), number, priority)


def times(tickets: list[Ticket]) -> list[tuple[float | None, float | None]]:
    return [(ticket.started_at, ticket.finished_at) for ticket in tickets]


def finish_all(engine: VirtualCopyEngine, tickets: list[Ticket]) -> list[Ticket]:
    """All tickets in the order in which they finish."""
    order: list[Ticket] = []
    while left := [ticket for ticket in tickets if ticket not in order]:
        order += engine.wait(left)
    return order


def test_the_clock_goes_forward_only() -> None:
    clock = VirtualClock()
    clock.advance(1.5)
    clock.advance_to(1.0)
    assert clock.now == 1.5
    for dt in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="time cannot advance"):
            clock.advance(dt)


def test_copies_share_one_link_and_wait_advances_the_clock(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    tickets = [submit(engine, 0), submit(engine, 1)]
    assert [ticket.state for ticket in tickets] == [TicketState.RUNNING, TicketState.QUEUED]
    assert engine.wait([tickets[1]]) == [tickets[1]]
    assert times(tickets) == [(10.0, 12.0), (12.0, 14.0)]
    assert clock.now == engine.now() == 14.0


def test_wait_stops_at_the_first_copy_that_unblocks_it(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    tickets = [submit(engine, number) for number in range(3)]
    assert engine.wait(tickets) == [tickets[0]] and clock.now == 12.0
    assert engine.wait(tickets) == [tickets[0]] and clock.now == 12.0
    assert engine.wait([]) == [] and clock.now == 12.0


def test_copies_finish_at_their_own_time_while_others_compute(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    tickets = [submit(engine, number) for number in range(3)]
    clock.advance(5.0)
    engine.settle()
    assert [ticket.state for ticket in tickets] == [TicketState.DONE, TicketState.DONE, TicketState.RUNNING]
    assert times(tickets) == [(10.0, 12.0), (12.0, 14.0), (14.0, None)]
    assert clock.now == 15.0
    engine.wait([tickets[2]])
    assert clock.now == 16.0


def test_an_idle_link_starts_at_once_and_never_in_the_past(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    engine.wait([submit(engine, 0)])
    clock.advance(100.0)
    late = submit(engine, 1)
    engine.wait([late])
    assert times([late]) == [(112.0, 114.0)]


def test_demands_overtake_queued_prefetches_but_not_the_running_one(engine: VirtualCopyEngine) -> None:
    tickets = [submit(engine, 0, PREFETCH), submit(engine, 1, PREFETCH), submit(engine, 2), submit(engine, 3)]
    assert [ticket.slot for ticket in finish_all(engine, tickets)] == [0, 2, 3, 1]


def test_a_promoted_prefetch_is_the_last_of_the_demands(engine: VirtualCopyEngine) -> None:
    tickets = [submit(engine, 0), submit(engine, 1, PREFETCH), submit(engine, 2, PREFETCH), submit(engine, 3)]
    engine.promote(tickets[2])
    assert tickets[2].priority is DEMAND
    assert [ticket.slot for ticket in finish_all(engine, tickets)] == [0, 3, 2, 1]


def test_a_promotion_does_not_overtake_what_has_begun_by_now(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    tickets = [submit(engine, number, PREFETCH) for number in range(3)]
    clock.advance(2.5)
    engine.promote(tickets[2])
    engine.promote(tickets[1])
    assert [ticket.slot for ticket in finish_all(engine, tickets)] == [0, 1, 2]
    assert [ticket.priority for ticket in tickets] == [PREFETCH, PREFETCH, DEMAND]


def test_what_has_begun_by_now_cannot_be_cancelled(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    done, running, queued = submit(engine, 0), submit(engine, 1), submit(engine, 2)
    clock.advance(2.5)
    assert not engine.cancel(done) and not engine.cancel(running)
    assert engine.cancel(queued) and not engine.cancel(queued)
    assert [t.state for t in (done, running, queued)] == [TicketState.DONE, TicketState.RUNNING, TicketState.CANCELLED]
    assert queued.finished_at == 12.5 and engine.wait([running, queued]) == [queued]


def test_bytes_arrive_when_the_copy_completes(clock: VirtualClock) -> None:
    store, pool = ArrayStore(), SlotPool(4, SMALL, poison=True)
    engine = VirtualCopyEngine(clock, lambda nbytes: nbytes / SMALL.slot_bytes, store, pool)
    ticket = engine.submit(ExpertId(1, 2), 3, DEMAND)
    clock.advance(0.9)
    engine.settle()
    assert pool.weights.w13_SNH[3].isnan().all()
    engine.wait([ticket])
    assert torch.equal(pool.row(3), store.row(ExpertId(1, 2)))
    assert ticket.nbytes == SMALL.slot_bytes and clock.now == 11.0


def test_without_a_store_an_expert_has_the_bytes_it_is_said_to_have(clock: VirtualClock) -> None:
    engine = VirtualCopyEngine(clock, lambda nbytes: nbytes / 1000, nbytes=500)
    engine.wait([submit(engine, 0)])
    assert clock.now == 10.5


def test_store_and_pool_go_together(clock: VirtualClock) -> None:
    with pytest.raises(ValueError, match="both or neither"):
        VirtualCopyEngine(clock, lambda nbytes: 1.0, ArrayStore())


def test_a_failed_read_fails_its_ticket_and_the_link_goes_on(clock: VirtualClock) -> None:
    bad_expert = ExpertId(0, 1)
    store, pool = ArrayStore(fail_on=[bad_expert]), SlotPool(4, SMALL)
    copies: list[tuple[float, float, int]] = []
    engine = VirtualCopyEngine(clock, lambda n: 2.0, store, pool, on_copied=lambda *copy: copies.append(copy))
    bad, good = engine.submit(bad_expert, 0, DEMAND), engine.submit(ExpertId(0, 2), 1, DEMAND)
    engine.wait([good])
    assert bad.state is TicketState.FAILED and isinstance(bad.error, CopyError) and "0/1" in str(bad.error)
    assert good.state is TicketState.DONE and torch.equal(pool.row(1), store.row(ExpertId(0, 2)))
    assert copies == [(12.0, 14.0, SMALL.slot_bytes)]


def test_close_finishes_the_running_copy_and_cancels_the_rest(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    running, queued = submit(engine, 0), submit(engine, 1)
    engine.close()
    engine.close()
    assert (running.state, queued.state) == (TicketState.DONE, TicketState.CANCELLED) and clock.now == 12.0
    with pytest.raises(ClosedError, match="0/2"):
        submit(engine, 2)


def test_waiting_for_somebody_elses_copy_is_refused(engine: VirtualCopyEngine, clock: VirtualClock) -> None:
    other = submit(VirtualCopyEngine(clock, lambda nbytes: 1.0), 0)
    with pytest.raises(IntegrityError, match="none of which"):
        engine.wait([other])


def shuffled(seed: int) -> VirtualCopyEngine:
    return VirtualCopyEngine(VirtualClock(), lambda nbytes: 1.0, shuffle=random.Random(seed))


def test_shuffled_copies_complete_in_every_order() -> None:
    orders = set()
    for seed in range(200):
        engine = shuffled(seed)
        tickets = [submit(engine, 0, PREFETCH), submit(engine, 1), submit(engine, 2)]
        orders.add(tuple(ticket.slot for ticket in finish_all(engine, tickets)))
        assert engine.now() == 3.0
    assert len(orders) == 6


def test_a_seed_always_gives_the_same_order() -> None:
    def order() -> list[int]:
        engine = shuffled(7)
        return [ticket.slot for ticket in finish_all(engine, [submit(engine, number) for number in range(8)])]

    assert order() == order()


def test_a_shuffled_link_decides_once_time_moves() -> None:
    clock = VirtualClock()
    engine = VirtualCopyEngine(clock, lambda nbytes: 1.0, shuffle=random.Random(0))
    tickets = [submit(engine, 0), submit(engine, 1)]
    assert {ticket.state for ticket in tickets} == {TicketState.QUEUED}
    clock.advance(0.5)
    engine.settle()
    assert {ticket.state for ticket in tickets} == {TicketState.QUEUED, TicketState.RUNNING}
    clock.advance(1.5)
    engine.settle()
    assert sorted(times(tickets)) == [(0.0, 1.0), (1.0, 2.0)]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from(Priority)),
        st.tuples(st.sampled_from(["cancel", "promote", "wait"]), st.integers(0, 20)),
        st.tuples(st.just("advance"), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    ),
    max_size=30,
)


@given(steps=STEPS, shuffle=st.sampled_from([None, 1, 2]))
def test_the_link_is_never_shared_and_never_idle_with_work(steps: list[tuple[str, float]], shuffle: int | None) -> None:
    clock = VirtualClock()
    engine = VirtualCopyEngine(clock, lambda n: 1.0, shuffle=None if shuffle is None else random.Random(shuffle))
    tickets: list[Ticket] = []
    for step, value in steps:
        if step == "submit":
            tickets.append(submit(engine, len(tickets), Priority(int(value))))
        elif step == "advance":
            clock.advance(value)
        elif tickets:
            chosen = tickets[int(value) % len(tickets)]
            engine.wait([chosen]) if step == "wait" else getattr(engine, step)(chosen)
    finish_all(engine, tickets)
    copied = sorted((t for t in tickets if t.state is TicketState.DONE), key=lambda t: t.finished_at or 0.0)
    free_at = 0.0
    while copied:
        ticket = copied.pop(0)
        earliest = max(free_at, min(t.issued_at for t in (ticket, *copied)))
        assert ticket.started_at == earliest and ticket.finished_at == earliest + 1.0
        free_at = earliest + 1.0
