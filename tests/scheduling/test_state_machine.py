"""Slots, scheduler and copy engine, driven at random through all that may happen to them, failure and shutdown too.

Nothing may be lost, owned twice, evicted while held, read before it is READY or written while it is read. Slots are
poisoned with NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from duoserve.config import Phase
from duoserve.errors import ClosedError, CopyError
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool, SlotState
from duoserve.experts.tickets import TicketState
from duoserve.experts.virtual import ComputeLane, VirtualClock
from duoserve.metrics import Meter
from duoserve.scheduling.lease import StandingLease
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import POLICIES, get_policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.scheduling.source import Lease, ReadyExpert
from tests.helpers.fakes import ArrayStore
from tests.scheduling.fortune import GUESSING, Teller, generous_link, routed
from tests.scheduling.recording import Read, RecordingEngine, clashes, misreadings, misshapen

LAYERS, EXPERTS, TOP_K = 3, 4, 2
TINY = ExpertLayout(torch.bfloat16, hidden=32, intermediate=16)  # one page
PIECE_BYTES = 1500
POISON = 0xFF

PHASE = st.sampled_from(Phase)
TOKENS = st.sampled_from([1, 2, 100])
LAYER = st.integers(0, LAYERS - 1)
WANTED = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)
EXPERT = st.builds(ExpertId, LAYER, st.integers(0, EXPERTS - 1))


class ConsumerError(Exception):
    """What the computation of a batch may raise."""


class Slots(RuleBasedStateMachine):
    """Over a virtual link that completes the pieces of copies in any order, and a compute lane that lags behind.

    The rules have no preconditions: whether a lease is at its end is up to the threads of the subclass, and hypothesis
    wants the same choices to lead to the same rules.
    """

    policy: str
    guessed: list[int]  # how many guesses each layer of decode steps has copied, over all examples

    def make_engine(self, seed: int) -> CopyEngine:
        """A copy takes a second; prefetches go in three pieces, one of them odd, or whole."""
        self.recording = RecordingEngine(
            self.clock,
            lambda nbytes: nbytes / TINY.slot_bytes,
            self.store,
            self.pool,
            shuffle=random.Random(seed),
            piece_bytes=PIECE_BYTES if seed % 4 else None,
            lane=self.lane,
        )
        return self.recording

    @initialize(
        slots=st.integers(TOP_K + 1, 12),
        seed=st.integers(0, 99),
        work_s=st.sampled_from([0.0, 0.3, 5.0]),
    )
    def build(self, slots: int, seed: int, work_s: float) -> None:
        num_slots = LAYERS * EXPERTS if self.policy == "resident" else slots
        self.clock = VirtualClock()
        self.lane = ComputeLane(self.clock)
        self.work_s = work_s  # of a batch, on the lane
        self.reads: list[Read] = []
        self.meter = Meter()
        self.store = ArrayStore(TINY, LAYERS, EXPERTS)
        self.pool = SlotPool(num_slots, TINY, poison=True)
        self.engine = self.make_engine(seed)
        shape, policy = ModelShape(EXPERTS, TOP_K, tuple(range(LAYERS))), get_policy(self.policy)
        self.scheduler = Scheduler(shape, self.pool, self.engine, policy, self.meter, self.fortune_teller(seed))
        self.table = self.scheduler.table
        self.was_broken = False
        self.closed = False
        self.in_pass = False
        self.layer = -1  # of the last lease
        self.exhausted = False  # whether that came to its end
        self.lease: Lease | None = None
        self.batches: Iterator[list[ReadyExpert]] = iter(())
        self.batch: list[ReadyExpert] = []  # what the consumer computes on
        self.owed: set[int] = set()  # what the lease has yet to hand out

    def fortune_teller(self, seed: int) -> Teller | None:
        """Says anything; one time in three there is none."""
        rng = np.random.default_rng(seed)
        return Teller(lambda layer: rng.random(EXPERTS), horizon=2 + seed % 3) if seed % 3 < 2 else None

    def hear(self, layer: int, wanted: list[int]) -> None:
        """The router has spoken, if anybody listens."""
        if self.scheduler.listener is not None:
            self.scheduler.listener.routed(routed(layer, wanted))

    @rule(phase=PHASE, tokens=TOKENS, asked=st.lists(st.tuples(LAYER, WANTED), min_size=1, max_size=6))
    def steps(self, phase: Phase, tokens: int, asked: list[tuple[int, list[int]]]) -> None:
        """The next things that a model would do, but for the order of the layers."""
        for layer, wanted in asked:
            if self.lease is not None:
                self.next_batch()
            elif self.in_pass:
                self.acquire(layer, wanted)
            elif not self.closed:
                self.scheduler.begin(phase, tokens)
                self.in_pass, self.layer = True, -1
            self.nothing_is_lost_or_stale()

    @rule(phase=PHASE, tokens=TOKENS, routing=st.lists(WANTED, min_size=LAYERS, max_size=LAYERS))
    def whole_pass(self, phase: Phase, tokens: int, routing: list[list[int]]) -> None:
        self.end()
        if self.closed:
            return
        self.scheduler.begin(phase, tokens)
        self.in_pass = True
        for layer, wanted in enumerate(routing):
            self.acquire(layer, wanted)
            while self.lease is not None:
                self.next_batch()
                self.nothing_is_lost_or_stale()
        self.end()

    @rule(fails=st.booleans())
    def leave(self, fails: bool) -> None:
        """The consumer leaves the lease early, with an exception of its own or without."""
        error = ConsumerError() if fails else None
        if self.lease is not None:
            self.lease.__exit__(type(error) if error else None, error, None)
        self.lease, self.batch = None, []
        assert self.num_holds() == 0

    @rule()
    def end(self) -> None:
        was_open = self.lease is not None
        self.scheduler.end()
        assert self.num_holds() == 0
        if self.in_pass and (was_open or not (self.exhausted and self.layer == LAYERS - 1)):
            assert not self.is_loading()
        self.in_pass, self.lease, self.batch = False, None, []

    @rule()
    def load_all(self) -> None:
        if self.in_pass or self.closed:
            return
        try:
            self.scheduler.load_all()
        except CopyError:
            assert self.was_broken
        assert not self.is_loading()

    @rule(experts=st.sets(EXPERT, max_size=3))
    def break_reads(self, experts: set[ExpertId]) -> None:
        self.store.fail_on = experts
        self.was_broken |= bool(experts)  # a copy may fail long before somebody hears of it

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(chance=st.integers(1, 12))
    def close(self, chance: int) -> None:
        if chance < 12:  # it must be rare, for not much happens after it
            return
        self.scheduler.close()
        self.closed, self.in_pass, self.lease, self.batch = True, False, None, []
        assert self.num_holds() == 0 and not self.is_loading()
        with pytest.raises(ClosedError):
            self.scheduler.begin(Phase.DECODE, 1)

    @invariant()
    def nothing_is_lost_or_stale(self) -> None:
        self.table.check_integrity()
        self.check_batch()
        for slot in range(self.table.num_slots):
            expert, state = self.table.expert_in(slot), self.table.state(slot)
            if state is SlotState.READY:
                assert expert is not None and torch.equal(self.pool.row(slot), self.store.row(expert))
            elif state is SlotState.EMPTY:
                assert bool((self.pool.row(slot) == POISON).all())

    def acquire(self, layer: int, wanted: list[int]) -> None:
        """Half the layers take what is there first, and the others hear the routing first; some hear of nothing."""
        self.lease = self.scheduler.acquire(layer, wanted).__enter__()
        self.batches, self.owed = iter(self.lease), set(wanted)
        self.layer, self.exhausted = layer, False
        if layer % 2:
            self.compute(self.lease.at_once())
        if sum(wanted) % 5:
            self.hear(layer, wanted)
            guesses = self.scheduler._residency.ledger.guesses
            before = len(guesses)
            self.lease.prefetch()
            self.guessed.append(len(guesses) - before)

    def next_batch(self) -> None:
        self.check_batch()
        batch: list[ReadyExpert] = []
        try:
            batch = next(self.batches)
        except StopIteration:
            assert not self.owed
            self.exhausted = True
            self.leave(fails=False)
        except CopyError:
            assert self.was_broken
            self.leave(fails=True)
        self.compute(batch)

    def compute(self, batch: list[ReadyExpert]) -> None:
        self.batch = batch
        self.check_batch()
        self.owed -= {one.expert for one in self.batch}
        start, stop = self.lane.launch(self.work_s)
        self.reads += [Read(start, stop, slot, ExpertId(self.layer, expert)) for expert, slot in self.batch]

    def check_link(self) -> None:
        """The link kept order, and every byte that it moved has its place in the books, now that nothing moves."""
        assert misshapen(self.recording) == []
        assert clashes(self.recording, self.reads) == misreadings(self.recording, self.reads) == []
        moved = sum(ticket.sent for ticket in self.recording.tickets if ticket.state is not TicketState.FAILED)
        unused = moved - self.meter.snapshot().bytes.total
        assert unused % TINY.slot_bytes == 0 and 0 <= unused <= len(self.table.ready()) * TINY.slot_bytes

    def check_batch(self) -> None:
        """What the consumer computes on is what it asked for, held (or there for good), and all there."""
        for expert, slot in self.batch:
            assert self.table.expert_in(slot) == (self.layer, expert)
            assert self.table.holds(slot) == (0 if isinstance(self.lease, StandingLease) else 1)
            assert torch.equal(self.pool.row(slot), self.store.row(ExpertId(self.layer, expert)))

    def is_loading(self) -> bool:
        return any(self.table.state(slot) is SlotState.LOADING for slot in range(self.table.num_slots))

    def num_holds(self) -> int:
        return sum(self.table.holds(slot) for slot in range(self.table.num_slots))

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.close(chance=12)
            self.nothing_is_lost_or_stale()
            self.check_link()


class ThreadedSlots(Slots):
    """Over threads, which complete copies when they like."""

    def make_engine(self, seed: int) -> CopyEngine:
        return ThreadedCopyEngine(self.store, self.pool, num_threads=1 + seed % 3)

    def check_link(self) -> None:
        """Threads keep no log."""


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize(("over", "examples"), [(Slots, 18), (ThreadedSlots, 6)])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_course_of_events(policy: str, over: type[Slots], examples: int) -> None:
    machine = type(over.__name__, (over,), {"policy": policy, "guessed": []})
    limits = settings(max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=CHECKS)
    with generous_link():
        run_state_machine_as_test(machine, settings=limits)
    few = over is ThreadedSlots  # which may well guess nothing
    assert sum(machine.guessed) > 0 or policy not in GUESSING or few
