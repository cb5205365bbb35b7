"""Slots, scheduler and copy engine, driven at random through all that may happen to them, failure and shutdown too.

Nothing may be lost, owned twice, evicted while held, or read before it is READY. Slots are poisoned with NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from duoserve.config import Phase
from duoserve.errors import ClosedError, CopyError
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool, SlotState, SlotTable
from duoserve.experts.virtual import VirtualClock, VirtualCopyEngine
from duoserve.metrics import Meter
from duoserve.scheduling.policies import POLICIES, get_policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.scheduling.source import Lease, ReadyExpert
from tests.fakes import ArrayStore

LAYERS, EXPERTS, TOP_K = 3, 4, 2
TINY = ExpertLayout(torch.bfloat16, hidden=32, intermediate=16)  # one page
POISON = 0xFF
WANTED = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)
TOKENS = st.sampled_from([1, 2, 100])
EXPERT = st.builds(ExpertId, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


class ConsumerError(Exception):
    """What the computation of a batch may raise."""


class Slots(RuleBasedStateMachine):
    """Over a virtual link that completes copies in any order."""

    def make_engine(self, seed: int) -> CopyEngine:
        return VirtualCopyEngine(self.clock, lambda _: 1.0, self.store, self.pool, shuffle=random.Random(seed))

    @initialize(policy=st.sampled_from(sorted(POLICIES)), slots=st.integers(TOP_K + 1, 12), seed=st.integers(0, 99))
    def build(self, policy: str, slots: int, seed: int) -> None:
        slots = LAYERS * EXPERTS if policy == "resident" else slots
        self.clock = VirtualClock()
        self.store = ArrayStore(TINY, LAYERS, EXPERTS)
        self.pool = SlotPool(slots, TINY, poison=True)
        self.table = SlotTable(LAYERS, EXPERTS, slots)
        self.engine = self.make_engine(seed)
        self.scheduler = Scheduler(
            table=self.table,
            pool=self.pool,
            engine=self.engine,
            policy=get_policy(policy),
            top_k=TOP_K,
            num_layers=LAYERS,
            num_experts=EXPERTS,
            meter=Meter(),
        )
        self.in_pass = False
        self.closed = False
        self.layer = -1
        self.lease: Lease | None = None
        self.batches: Iterator[list[ReadyExpert]] = iter(())
        self.batch: list[ReadyExpert] = []  # what the consumer computes on
        self.wanted: set[int] = set()  # what the lease still owes

    def open(self) -> bool:
        return not self.closed

    @precondition(lambda self: self.open() and not self.in_pass)
    @rule(phase=st.sampled_from(Phase), tokens=TOKENS)
    def begin(self, phase: Phase, tokens: int) -> None:
        self.scheduler.begin(phase, tokens)
        self.in_pass, self.layer = True, -1

    @precondition(lambda self: self.in_pass and self.lease is None and self.layer < LAYERS - 1)
    @rule(wanted=WANTED)
    def acquire(self, wanted: list[int]) -> None:
        self.layer += 1
        self.lease = self.scheduler.acquire(self.layer, wanted).__enter__()
        self.batches, self.wanted = iter(self.lease), set(wanted)

    @precondition(lambda self: self.lease is not None)
    @rule()
    def next_batch(self) -> None:
        self.check_batch()
        try:
            self.batch = next(self.batches)
        except StopIteration:
            assert not self.wanted
            self.leave(None)
        except CopyError as error:
            assert self.store.fail_on
            self.leave(error)
        else:
            self.check_batch()
            self.wanted -= {one.expert for one in self.batch}

    @precondition(lambda self: self.lease is not None)
    @rule(error=st.sampled_from([None, ConsumerError()]))
    def leave(self, error: Exception | None) -> None:
        assert self.lease is not None
        self.lease.__exit__(type(error) if error else None, error, None)
        self.lease, self.batch, self.wanted = None, [], set()
        assert self.holds() == 0

    @precondition(lambda self: self.in_pass)
    @rule()
    def end(self) -> None:
        broken = self.layer < LAYERS - 1 or self.lease is not None
        self.scheduler.end()
        self.in_pass, self.lease, self.batch = False, None, []
        assert self.holds() == 0
        if broken:
            assert SlotState.LOADING not in self.states()

    @precondition(lambda self: self.open() and not self.in_pass)
    @rule(phase=st.sampled_from(Phase), tokens=TOKENS, routing=st.lists(WANTED, min_size=LAYERS, max_size=LAYERS))
    def whole_pass(self, phase: Phase, tokens: int, routing: list[list[int]]) -> None:
        self.begin(phase, tokens)
        for wanted in routing:
            self.acquire(wanted)
            while self.lease is not None:
                self.next_batch()
                self.nothing_is_lost_or_stale()
        self.end()

    @precondition(lambda self: self.open() and not self.in_pass)
    @rule()
    def load_all(self) -> None:
        try:
            self.scheduler.load_all()
        except CopyError:
            assert self.store.fail_on
        assert SlotState.LOADING not in self.states()

    @rule(experts=st.sets(EXPERT, max_size=3))
    def break_reads(self, experts: set[ExpertId]) -> None:
        self.store.fail_on = experts

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.open())
    @rule()
    def close(self) -> None:
        self.scheduler.close()
        self.closed, self.in_pass, self.lease, self.batch = True, False, None, []
        assert SlotState.LOADING not in self.states() and self.holds() == 0
        with pytest.raises(ClosedError):
            self.scheduler.begin(Phase.DECODE, 1)

    @invariant()
    def nothing_is_lost_or_stale(self) -> None:
        self.table.check_integrity()
        self.check_batch()
        for slot, state in enumerate(self.states()):
            expert = self.table.expert_in(slot)
            if state is SlotState.READY:
                assert expert is not None and torch.equal(self.pool.row(slot), self.store.row(expert))
            elif state is SlotState.EMPTY:
                assert bool((self.pool.row(slot) == POISON).all())

    def check_batch(self) -> None:
        """What the consumer computes on is what it asked for, held, and all there."""
        for expert, slot in self.batch:
            assert self.table.expert_in(slot) == (self.layer, expert) and self.table.holds(slot) == 1
            assert torch.equal(self.pool.row(slot), self.store.row(ExpertId(self.layer, expert)))

    def states(self) -> Sequence[SlotState]:
        return [self.table.state(slot) for slot in range(self.table.num_slots)]

    def holds(self) -> int:
        return sum(self.table.holds(slot) for slot in range(self.table.num_slots))

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.close()
            self.nothing_is_lost_or_stale()


class ThreadedSlots(Slots):
    """Over threads, which complete copies when they like."""

    def make_engine(self, seed: int) -> CopyEngine:
        return ThreadedCopyEngine(self.store, self.pool, num_threads=1 + seed % 3)


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]


def test_any_course_of_events() -> None:
    limits = settings(max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=CHECKS)
    run_state_machine_as_test(Slots, settings=limits)


def test_any_course_of_events_with_threads() -> None:
    limits = settings(max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=CHECKS)
    run_state_machine_as_test(ThreadedSlots, settings=limits)
