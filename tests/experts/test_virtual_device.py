"""Pieces on the virtual link, and copies that wait for the readers of their slots on the virtual compute lane."""

from __future__ import annotations

import pytest
import torch

from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.tickets import Priority, Ticket, TicketState
from duoserve.experts.virtual import ComputeLane, VirtualClock, VirtualCopyEngine
from tests.helpers.fakes import SMALL, ArrayStore

DEMAND, PREFETCH = Priority


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def lane(clock: VirtualClock) -> ComputeLane:
    return ComputeLane(clock)


@pytest.fixture
def carried() -> list[tuple[float, float, int]]:
    return []


@pytest.fixture
def engine(clock: VirtualClock, lane: ComputeLane, carried: list[tuple[float, float, int]]) -> VirtualCopyEngine:
    """Experts of ten bytes, a byte a second, prefetches in pieces of four."""
    return VirtualCopyEngine(
        clock, float, nbytes=10, piece_bytes=4, lane=lane, on_copied=lambda *copy: carried.append(copy)
    )


def submit(engine: VirtualCopyEngine, slot: int, priority: Priority = DEMAND) -> Ticket:
    return engine.submit(ExpertId(0, slot), slot, priority)


def times(*tickets: Ticket) -> list[tuple[float | None, float | None]]:
    return [(ticket.started_at, ticket.finished_at) for ticket in tickets]


class TestPieces:
    def test_a_demand_waits_for_one_piece_and_the_guess_goes_on_where_it_stopped(
        self, engine: VirtualCopyEngine, clock: VirtualClock, carried: list[tuple[float, float, int]]
    ) -> None:
        guess = submit(engine, 0, PREFETCH)
        clock.advance(5.0)
        demand = submit(engine, 1)
        engine.wait([guess])
        assert times(guess, demand) == [(0.0, 20.0), (8.0, 18.0)]
        assert carried == [(0.0, 4.0, 4), (4.0, 8.0, 4), (8.0, 18.0, 10), (18.0, 20.0, 2)]

    def test_the_rest_of_a_promoted_guess_is_interrupted_no_more(
        self, engine: VirtualCopyEngine, clock: VirtualClock
    ) -> None:
        guess = submit(engine, 0, PREFETCH)
        clock.advance(1.0)
        engine.promote(guess)
        demand = submit(engine, 1)
        engine.wait([demand])
        assert times(guess, demand) == [(0.0, 10.0), (10.0, 20.0)]

    def test_a_guess_can_be_cancelled_until_its_last_piece_is_on_the_link(
        self, engine: VirtualCopyEngine, clock: VirtualClock, carried: list[tuple[float, float, int]]
    ) -> None:
        guess = submit(engine, 0, PREFETCH)
        clock.advance(5.0)
        assert guess.state is TicketState.RUNNING and engine.cancel(guess) and not engine.cancel(guess)
        assert (guess.state, guess.sent, guess.finished_at) == (TicketState.CANCELLED, 8, 5.0)
        other = submit(engine, 0, PREFETCH)  # into the same slot, behind the piece that is on the link
        clock.advance(12.0)
        assert not engine.cancel(other)
        engine.wait([other])
        assert times(other) == [(8.0, 18.0)]
        assert [stop for _, stop, _ in carried] == [4.0, 8.0, 12.0, 16.0, 18.0]

    def test_no_byte_shows_before_the_last_has_arrived(self, clock: VirtualClock) -> None:
        store, pool = ArrayStore(), SlotPool(2, SMALL, poison=True)
        engine = VirtualCopyEngine(clock, float, store, pool, piece_bytes=5000)
        guess = engine.submit(ExpertId(1, 2), 1, PREFETCH)
        clock.advance(SMALL.slot_bytes - 1.0)
        engine.settle()
        assert guess.sent == SMALL.slot_bytes and bool((pool.row(1) == 0xFF).all())
        engine.wait([guess])
        assert torch.equal(pool.row(1), store.row(ExpertId(1, 2)))

    def test_a_copy_that_fails_does_so_at_its_end(self, clock: VirtualClock) -> None:
        store, pool = ArrayStore(fail_on=[ExpertId(0, 0)]), SlotPool(2, SMALL)
        engine = VirtualCopyEngine(clock, float, store, pool, piece_bytes=5000)
        guess = submit(engine, 0, PREFETCH)
        engine.wait([guess])
        assert (guess.state, guess.finished_at, store.reads) == (TicketState.FAILED, 12288.0, [ExpertId(0, 0)])

    def test_close_waits_for_the_piece_on_the_link_only(self, engine: VirtualCopyEngine, clock: VirtualClock) -> None:
        guess = submit(engine, 0, PREFETCH)
        clock.advance(1.0)
        engine.close()
        assert guess.state is TicketState.CANCELLED and clock.now == 4.0 and engine.on_link is None


class TestLane:
    def test_the_host_runs_ahead_until_it_reads_a_result(self, lane: ComputeLane, clock: VirtualClock) -> None:
        assert [lane.launch(2.0), lane.launch(3.0)] == [(0.0, 2.0), (2.0, 5.0)]
        assert clock.now == 0.0
        lane.synchronize()
        assert clock.now == 5.0
        clock.advance(1.0)
        assert lane.launch(1.0) == (6.0, 7.0)

    def test_a_copy_starts_when_the_readers_of_its_slot_have_ended(
        self, engine: VirtualCopyEngine, lane: ComputeLane
    ) -> None:
        lane.launch(7.0)
        engine.fence([0, 1])
        lane.launch(9.0)  # reads neither
        copy, elsewhere = submit(engine, 0), submit(engine, 2, PREFETCH)
        engine.wait([copy])
        engine.wait([elsewhere])
        # The slot that nobody reads goes first, until the demand can start; that was waiting for its slot alone.
        assert times(copy, elsewhere) == [(8.0, 18.0), (0.0, 20.0)]

    def test_an_idle_link_begins_when_the_first_slot_is_free(
        self, engine: VirtualCopyEngine, lane: ComputeLane, clock: VirtualClock
    ) -> None:
        for slot in (0, 1):
            lane.launch(30.0)
            engine.fence([slot])
        tickets = [submit(engine, 1), submit(engine, 0)]
        clock.advance(23.0)
        tickets.append(submit(engine, 2, PREFETCH))
        for ticket in tickets:
            engine.wait([ticket])
        assert times(*tickets) == [(60.0, 70.0), (31.0, 41.0), (23.0, 43.0)]

    def test_a_copy_into_a_slot_that_was_rewritten_waits_for_its_new_readers_only(
        self, engine: VirtualCopyEngine, lane: ComputeLane
    ) -> None:
        lane.launch(3.0)
        engine.fence([0])
        engine.wait([submit(engine, 0)])
        again = submit(engine, 0)
        engine.wait([again])
        assert times(again) == [(13.0, 23.0)]

    def test_without_a_lane_nobody_reads(self, clock: VirtualClock) -> None:
        engine = VirtualCopyEngine(clock, float, nbytes=10)
        engine.fence([0])
        assert submit(engine, 0).started_at == 0.0
