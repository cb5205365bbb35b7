"""The budget of guesses where a device makes copies behind the host: what counts is when it makes them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from torch import Tensor

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool, SlotTable
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.streams import Lane, Mark
from duoserve.experts.tickets import Priority, Ticket
from duoserve.metrics import Meter
from duoserve.scheduling.link_budget import IdleLink
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.residency import Residency
from duoserve.scheduling.scheduler import Scheduler
from tests.helpers.fake_streams import FakeMark, FakeStreams
from tests.helpers.fakes import SMALL, InRam
from tests.scheduling.fortune import Teller, certain, routed

LAYERS, EXPERTS, SLOTS = 4, 8, 12
COPY_S = 1000


class SlowLanes(FakeStreams):
    """An expert takes COPY_S, beside which a step (a second) is little. Nothing is done that nobody waits for."""

    def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
        def make() -> None:
            self.spend(COPY_S * len(target_B) // SMALL.slot_bytes)
            target_B.copy_(source_B)

        self._enqueue(lane, make)

    def compute(self, seconds: int) -> None:
        self.run(lambda: self.spend(seconds))

    def spend(self, seconds: int) -> None:
        with self._lock:
            self._steps += seconds

    def passed(self, mark: Mark) -> bool:
        return isinstance(mark, FakeMark) and mark.passed_at is not None

    def now(self) -> float:
        return float(self._steps)


class Engine(StreamCopyEngine):
    """Its clock is the device's. It takes the host a second to ask for a copy, and else nothing."""

    def __init__(self, streams: SlowLanes, pool: SlotPool) -> None:
        self._slow = streams
        self.asked: list[Ticket] = []
        super().__init__(InRam(SMALL, LAYERS, EXPERTS), pool, streams)

    def now(self) -> float:
        return self._slow.now()

    def ask(self, ticket: Ticket) -> None:
        super().ask(ticket)
        self.asked.append(ticket)
        self._slow.spend(1)


@pytest.fixture
def streams() -> SlowLanes:
    return SlowLanes(random.Random(0))


@pytest.fixture
def engine(streams: SlowLanes) -> Iterator[Engine]:
    with closing(Engine(streams, SlotPool(SLOTS, SMALL))) as made:
        yield made


def test_a_copy_takes_what_it_takes_the_device(streams: SlowLanes, engine: Engine) -> None:
    link = IdleLink(LAYERS, SLOTS)
    pool = SlotPool(SLOTS, SMALL)
    residency = Residency(SlotTable(LAYERS, EXPERTS, SLOTS), pool, engine, Meter(), link)
    for number in range(3):
        residency.load(ExpertId(0, number), number, Priority.DEMAND)
    asked_at = streams.now()
    while under_way := residency.under_way():
        residency.wait(under_way)
    assert streams.now() == asked_at and link.copy_s is None, "the device has made none yet"
    streams.finish()
    residency.settle()
    assert link.copy_s == pytest.approx(COPY_S, rel=0.05)


@pytest.mark.parametrize("between_s", [0, 3 * COPY_S])
def test_a_link_that_is_busy_with_demands_has_no_time_for_guesses(
    streams: SlowLanes, engine: Engine, between_s: int
) -> None:
    """And where something is computed before the next choice, it has."""
    rng = random.Random(1)
    shape = ModelShape(EXPERTS, 2, tuple(range(LAYERS)))
    teller = Teller(lambda layer: certain(EXPERTS, [1, 2], 0.8))
    scheduler = Scheduler(shape, SlotPool(SLOTS, SMALL), engine, get_policy("duoserve"), Meter(), teller)
    heard = scheduler.listener
    assert heard is not None
    for _ in range(60):
        heard.begin(Phase.DECODE, np.zeros(1, dtype=np.int64))
        scheduler.begin(Phase.DECODE, 1)
        for layer in range(LAYERS):
            wanted = rng.sample(range(EXPERTS), 2)
            streams.compute(between_s)
            streams.finish()  # the router's choice is on the host
            with scheduler.acquire(layer, wanted) as lease:
                heard.routed(routed(layer, wanted))
                lease.prefetch()
                for _ready in lease:
                    streams.compute(1)
        scheduler.end()
    guesses = [ticket for ticket in engine.asked if ticket.priority is Priority.PREFETCH]
    assert bool(guesses) is bool(between_s)
