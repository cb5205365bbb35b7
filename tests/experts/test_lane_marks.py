"""When copies were made, as a device that lags behind tells it."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from duoserve.experts.slots import SlotPool
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.streams import Lane, Mark
from duoserve.experts.tickets import Priority
from tests.experts.test_stream_engine import DEMAND, EXPERTS, PREFETCH, PartlyInRam, Rig, bring_all
from tests.helpers.fake_streams import FakeStreams
from tests.helpers.fakes import SMALL


class Clock(FakeStreams):
    """The device's clock runs ``fast`` times as fast as the host's, which counts the steps."""

    def __init__(self, fast: float = 1.0) -> None:
        super().__init__(random.Random(0))
        self.longest = 0.0
        self._fast = fast

    @property
    def steps(self) -> int:
        return self._steps

    def seconds(self, earlier: Mark, later: Mark) -> float:
        self.longest = max(self.longest, super().seconds(earlier, later))
        return self._fast * super().seconds(earlier, later)


class Stepping(StreamCopyEngine):
    """An engine on the clock of such a host."""

    def now(self) -> float:
        assert isinstance(self._streams, Clock)
        return float(self._streams.steps)


@pytest.mark.parametrize("fast", [0.9, 1.0, 1.1])
def test_times_are_counted_from_a_moment_that_is_not_long_ago(fast: float) -> None:
    """For a device counts in float32, and its clock and the host's part; so they stay the right times."""
    streams, pool, copied = Clock(fast), SlotPool(3, SMALL), list[tuple[float, float, int]]()
    engine = Stepping(PartlyInRam(EXPERTS), pool, streams, on_copied=lambda *copy: copied.append(copy))
    for number in range(100):
        begun = streams.steps
        bring_all(engine, [engine.submit(EXPERTS[number % 8], number % 3, Priority(number % 2))])
        streams.finish()
        engine.settle()
        parted = abs(fast - 1.0) * streams.longest
        assert len(copied) == number + 1
        assert begun - parted <= copied[-1][0] < copied[-1][1] <= streams.steps + parted
    engine.close()
    assert 0 < streams.longest < streams.steps / 10


def test_a_ticket_knows_when_the_device_made_its_copy() -> None:
    """Not when the host asked for it: the slot may be in use, or the lane; what is read from the disk is part of it."""
    streams, pool, store = Clock(), SlotPool(3, SMALL), PartlyInRam(EXPERTS[:4])
    with closing(Stepping(store, pool, streams, num_threads=1)) as engine:
        for _ in range(50):
            streams.run(lambda: None)
        engine.fence([0])
        in_use = engine.submit(EXPERTS[0], 0, DEMAND)
        bring_all(engine, [in_use])
        assert in_use.arrived_at is None
        gate = store.gate(EXPERTS[5])
        on_disk = engine.submit(EXPERTS[5], 1, DEMAND)
        gate.wait_entered()
        streams.finish()
        engine.settle()
        gate.open()
        bring_all(engine, [on_disk])
        streams.finish()
        engine.settle()
    took = [(one.arrived_at or 0.0) - (one.started_at or 0.0) for one in (in_use, on_disk)]
    assert 0 < took[0] < 20 and took[1] > 50


def test_a_copy_is_timed_before_anything_was_demanded() -> None:
    rig = Rig(PartlyInRam(in_ram=EXPERTS))
    rig.streams._order.remove(Lane.DEMAND)
    rig.bring(rig.engine.submit(EXPERTS[0], 0, PREFETCH))
    rig.streams._order.append(Lane.DEMAND)
    rig.engine.close()
    assert len(rig.copied) == 1
