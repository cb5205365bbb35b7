"""Copies on the lanes of a device that does everything as late, and in as odd an order, as the marks allow."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import ClosedError, ConfigError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.streams import Lane, Mark
from duoserve.experts.tickets import Priority, Ticket, TicketState
from tests.helpers.fake_streams import FakeMark, FakeStreams
from tests.helpers.fakes import PATIENCE_S, SMALL, ArrayStore

DEMAND, PREFETCH = Priority
EXPERTS = [ExpertId(0, e) for e in range(8)]
PIECE = 4096  # a third of an expert


class PartlyInRam(ArrayStore):
    """An ArrayStore of which the experts ``in_ram`` need not be read."""

    def __init__(self, in_ram: Collection[ExpertId], **options: object) -> None:
        super().__init__(num_layers=1, num_experts=len(EXPERTS), **options)
        self.in_ram = in_ram

    def host_row(self, expert: ExpertId) -> Tensor | None:
        return self.row(expert) if expert in self.in_ram else None


class Rig:
    """An engine over poisoned slots; ``kernel`` reads a slot on the compute lane when its turn comes."""

    def __init__(self, store: ArrayStore, seed: int = 0, num_slots: int = 3, num_threads: int = 2) -> None:
        self.store = store
        self.streams = FakeStreams(random.Random(seed))
        self.pool = SlotPool(num_slots, SMALL, poison=True)
        self.copied: list[tuple[float, float, int]] = []
        self.stalls: list[tuple[float, float]] = []
        self.engine = StreamCopyEngine(
            store,
            self.pool,
            self.streams,
            num_threads=num_threads,
            piece_bytes=PIECE,
            on_copied=lambda *copy: self.copied.append(copy),
            on_stalled=lambda *stall: self.stalls.append(stall),
        )
        self.wrong: list[int] = []
        self.reads = 0

    def kernel(self, slot: int, expert: ExpertId) -> None:
        def read() -> None:
            self.reads += 1
            if not torch.equal(self.pool.row(slot), self.store.row(expert)):
                self.wrong.append(slot)

        self.streams.run(read)

    def bring(self, ticket: Ticket) -> None:
        while not ticket.finished:
            assert self.engine.wait([ticket]) == [ticket]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(PartlyInRam(in_ram=EXPERTS[:4]))
    yield made
    made.engine.close()


class Step(NamedTuple):
    """A copy that is asked for, what becomes of it, and how many kernels read its slot if it is made."""

    expert: ExpertId
    slot: int
    priority: Priority
    promoted: bool
    cancelled: bool
    readers: int


# Drawn before anything runs: whether a copy can still be cancelled is up to the threads.
STEPS = st.builds(
    Step,
    expert=st.sampled_from(EXPERTS),
    slot=st.integers(0, 2),
    priority=st.sampled_from(Priority),
    promoted=st.booleans(),
    cancelled=st.sampled_from([True, False, False, False, False]),
    readers=st.integers(0, 2),
)


IN_VAIN = [Step(EXPERTS[0], 0, PREFETCH, False, False, 0), Step(EXPERTS[1], 0, DEMAND, False, False, 1)]


@example(steps=IN_VAIN, seed=0, in_ram=set(EXPERTS))
@given(steps=st.lists(STEPS, max_size=25), seed=st.integers(0, 10_000), in_ram=st.sets(st.sampled_from(EXPERTS)))
@settings(max_examples=60, deadline=None)
def test_kernels_read_what_was_asked_for(steps: list[Step], seed: int, in_ram: set[ExpertId]) -> None:
    """Slots are used again and again while the device is far behind: no copy too early, no kernel too early."""
    rig, made = Rig(PartlyInRam(in_ram), seed), 0
    with closing(rig.engine):
        for step in steps:
            ticket = rig.engine.submit(step.expert, step.slot, step.priority)
            if step.promoted:
                rig.engine.promote(ticket)
            if step.cancelled and rig.engine.cancel(ticket):
                assert ticket.state is TicketState.CANCELLED
                continue
            rig.bring(ticket)
            assert ticket.state is TicketState.DONE
            made += 1
            for _ in range(step.readers):
                rig.kernel(step.slot, step.expert)
            if step.readers:  # else it was in vain, and nothing stands behind the copy
                rig.engine.fence([step.slot])
        rig.streams.finish()
    assert not rig.wrong
    assert len(rig.copied) == made and all(begin <= end for begin, end, _ in rig.copied)
    assert all(started <= finished for started, finished in rig.stalls)


def test_a_demand_in_ram_is_enqueued_by_the_one_who_asks(rig: Rig) -> None:
    ticket = rig.engine.submit(EXPERTS[0], 0, DEMAND)
    assert ticket.state is TicketState.RUNNING, "a thread had to be waited for"
    rig.bring(ticket)
    rig.kernel(0, EXPERTS[0])
    rig.streams.finish()
    assert rig.reads == 1 and not rig.wrong and not rig.store.reads


def test_the_host_waits_for_no_copy_that_is_enqueued(rig: Rig) -> None:
    never = rig.streams.mark(Lane.COMPUTE)  # passed only when the compute lane gets its turn
    rig.engine.fence([0])
    ticket = rig.engine.submit(EXPERTS[1], 0, DEMAND)
    rig.engine._streams.passed = lambda mark: False
    assert rig.engine.wait([ticket]) == [ticket]
    assert never.passed_at is None, "the device was made to work"
    del rig.engine._streams.passed


class Link(FakeStreams):
    """Counts the bytes that stand on the lane of prefetches, where nothing moves that nobody waits for.

    ``most`` at any time, ``before_demands`` whenever a demand is enqueued, and ``left`` of them when a thread has
    waited for room; before it does, it calls ``interrupt``.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(random.Random(seed))
        self.most = self.standing = 0
        self.before_demands: list[int] = []
        self.left: list[int] = []
        self.interrupt: Callable[[], object] = lambda: None

    def passed(self, mark: Mark) -> bool:
        return isinstance(mark, FakeMark) and mark.passed_at is not None

    def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
        with self._lock:
            if lane is Lane.DEMAND:
                self.before_demands.append(self.standing)
                return super().copy(lane, target_B, source_B)
            self._enqueue(lane, lambda: self._made(target_B, source_B))
            self.standing += len(target_B)
            self.most = max(self.most, self.standing)

    def _made(self, target_B: Tensor, source_B: Tensor) -> None:
        self.standing -= len(target_B)
        target_B.copy_(source_B)

    def wait(self, mark: Mark) -> None:
        threaded = threading.current_thread() is not threading.main_thread()
        if threaded:
            self.interrupt()
        with self._lock:
            super().wait(mark)
            if threaded:
                self.left.append(self.standing)


def bring_all(engine: StreamCopyEngine, tickets: Collection[Ticket]) -> None:
    while left := [ticket for ticket in tickets if not ticket.finished]:
        engine.wait(left)


@pytest.mark.parametrize("piece_bytes", [PIECE, 2 * PIECE, 2 * SMALL.slot_bytes])
@pytest.mark.parametrize("seed", range(5))
def test_one_piece_of_all_prefetches_stands_on_the_lane(piece_bytes: int, seed: int) -> None:
    """Large experts go in parts, of small ones several are a piece; how many threads there are does not matter."""
    store, pool, streams = PartlyInRam(EXPERTS), SlotPool(8, SMALL, poison=True), Link(seed)
    engine = StreamCopyEngine(store, pool, streams, num_threads=3, piece_bytes=piece_bytes)
    bring_all(engine, [engine.submit(expert, slot, PREFETCH) for slot, expert in enumerate(EXPERTS)])
    engine.close()
    assert piece_bytes // 2 < streams.most <= piece_bytes
    assert all(torch.equal(pool.row(slot), store.row(expert)) for slot, expert in enumerate(EXPERTS))


@pytest.mark.parametrize("seed", range(5))
def test_a_demand_never_waits_behind_more_than_a_piece_of_guesses(seed: int) -> None:
    """However large they are. And the link has the next part to carry whenever one has been carried."""
    store, pool, streams = PartlyInRam(EXPERTS), SlotPool(8, SMALL, poison=True), Link(seed)
    engine = StreamCopyEngine(store, pool, streams, piece_bytes=PIECE)
    demands, missing = [], iter([6, 7])

    def demand() -> None:
        if (number := next(missing, None)) is not None:
            demands.append(engine.submit(EXPERTS[number], number, DEMAND))

    streams.interrupt = demand
    guesses = [engine.submit(expert, slot, PREFETCH) for slot, expert in enumerate(EXPERTS[:6])]
    bring_all(engine, guesses)
    bring_all(engine, demands)
    engine.close()
    assert 0 < max(streams.before_demands) <= PIECE
    assert streams.left and min(streams.left) > 0


class Interrupting(FakeStreams):
    """Calls ``interrupt`` when a thread waits for room on the lane; nothing is done that nobody waits for."""

    def __init__(self, seed: int) -> None:
        super().__init__(random.Random(seed))
        self.asked = threading.Event()
        self.interrupt: Callable[[], object] = lambda: None

    def passed(self, mark: Mark) -> bool:
        return isinstance(mark, FakeMark) and mark.passed_at is not None

    def wait(self, mark: Mark) -> None:
        if threading.current_thread() is not threading.main_thread():  # which waits when it makes the engine
            assert self.asked.wait(PATIENCE_S)
            self.interrupt()
        super().wait(mark)


class HalfWay:
    """A prefetch into slot 2 for which the engine does ``what`` when its first piece is on its way; it has finished."""

    def __init__(self, seed: int, what: Callable[[StreamCopyEngine, Ticket], object]) -> None:
        self.store, self.pool = PartlyInRam(EXPERTS), SlotPool(3, SMALL, poison=True)
        self.streams = Interrupting(seed)
        self.engine = StreamCopyEngine(self.store, self.pool, self.streams, num_threads=1, piece_bytes=PIECE)
        self.ticket = self.engine.submit(EXPERTS[5], 2, PREFETCH)
        self.streams.interrupt = lambda: what(self.engine, self.ticket)
        self.streams.asked.set()
        self.wait(self.ticket)

    def wait(self, ticket: Ticket) -> None:
        while not ticket.finished:
            self.engine.wait([ticket])

    def device_reads(self, expert: ExpertId) -> bool:
        """Whether the device finds the expert in the slot; the engine ends."""
        read: list[bool] = []
        self.streams.run(lambda: read.append(torch.equal(self.pool.row(2), self.store.row(expert))))
        self.streams.finish()
        self.engine.close()
        return read == [True]


@pytest.mark.parametrize("seed", range(40))
def test_a_prefetch_that_is_cancelled_half_way_leaves_its_slot_to_others(seed: int) -> None:
    run = HalfWay(seed, StreamCopyEngine.cancel)
    right = run.engine.submit(EXPERTS[6], 2, DEMAND)  # whose first bytes must not land before the last of the other's
    run.wait(right)
    assert run.device_reads(EXPERTS[6])
    assert (run.ticket.state, run.ticket.sent, right.state) == (TicketState.CANCELLED, PIECE, TicketState.DONE)
    assert not run.engine.cancel(run.ticket)


@pytest.mark.parametrize("seed", range(40))
def test_nothing_of_a_cancelled_prefetch_lands_behind_what_the_device_writes(seed: int) -> None:
    """As a decode step does that brings its misses by itself."""
    run = HalfWay(seed, StreamCopyEngine.cancel)
    run.engine.land()
    run.streams.run(lambda: run.pool.row(2).copy_(run.store.row(EXPERTS[6])))
    run.streams.finish()
    run.engine.close()
    assert torch.equal(run.pool.row(2), run.store.row(EXPERTS[6]))


@pytest.mark.parametrize("seed", range(10))
def test_nothing_of_a_cancelled_prefetch_is_on_its_way_once_the_engine_is_closed(seed: int) -> None:
    """For the rows that it reads are given back then."""
    run = HalfWay(seed, StreamCopyEngine.cancel)
    run.engine.close()
    landed_B = run.pool.row(2).clone()
    run.streams.finish()
    assert torch.equal(run.pool.row(2), landed_B)


@pytest.mark.parametrize("seed", range(40))
def test_a_prefetch_that_is_promoted_half_way_arrives_whole(seed: int) -> None:
    run = HalfWay(seed, StreamCopyEngine.promote)
    assert run.device_reads(EXPERTS[5]) and run.ticket.priority is DEMAND


def test_a_prefetch_into_a_slot_that_is_still_read_lets_others_pass() -> None:
    class NeverComputing(FakeStreams):
        """Notes which rows are copied to, in order."""

        def __init__(self) -> None:
            super().__init__(random.Random(0))
            self.targets: list[int] = []

        def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
            self.targets.append(target_B.data_ptr())
            super().copy(lane, target_B, source_B)

    store, pool, streams = PartlyInRam(EXPERTS[:7]), SlotPool(3, SMALL), NeverComputing()
    engine = StreamCopyEngine(store, pool, streams, num_threads=1)
    streams._order.remove(Lane.COMPUTE)
    gate = store.gate(EXPERTS[7])
    busy = engine.submit(EXPERTS[7], 2, DEMAND)  # which its only thread reads while the others queue up
    gate.wait_entered()
    engine.fence([0])
    engine.submit(EXPERTS[0], 0, PREFETCH)
    free = engine.submit(EXPERTS[1], 1, PREFETCH)
    gate.open()
    for ticket in (busy, free):
        while not ticket.finished:
            engine.wait([ticket])
    streams._order.append(Lane.COMPUTE)
    engine.close()
    assert streams.targets[:2] == [pool.row(2).data_ptr(), pool.row(1).data_ptr()]


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("seed", range(10))
def test_what_the_device_makes_the_pool_of_is_done_before_any_copy(seed: int, priority: Priority) -> None:
    streams, pool, store = FakeStreams(random.Random(seed)), SlotPool(1, SMALL), PartlyInRam(EXPERTS)
    streams.run(lambda: pool.rows_SB.fill_(0))
    streams._order.sort(key=lambda lane: lane is Lane.COMPUTE)  # which comes last, until somebody changes his mind
    engine = StreamCopyEngine(store, pool, streams)
    bring_all(engine, [engine.submit(EXPERTS[0], 0, priority)])
    engine.close()
    streams.finish()
    assert torch.equal(pool.row(0), store.row(EXPERTS[0]))


def test_after_close_nothing_can_be_asked_for(rig: Rig) -> None:
    ticket = rig.engine.submit(EXPERTS[5], 1, DEMAND)
    rig.engine.close()
    assert ticket.finished
    with pytest.raises(ClosedError, match="after close"):
        rig.engine.submit(EXPERTS[0], 0, DEMAND)
    rig.engine.close()


def test_it_takes_at_least_a_thread() -> None:
    with pytest.raises(ConfigError, match="copy_threads is 0"):
        Rig(PartlyInRam(in_ram=()), num_threads=0)
