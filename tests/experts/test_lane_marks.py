"""When copies were made, as a device that lags behind tells it."""

from __future__ import annotations

import random

from duoserve.experts.slots import SlotPool
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.streams import Lane, Mark
from duoserve.experts.tickets import Priority
from tests.experts.test_stream_engine import EXPERTS, PREFETCH, PartlyInRam, Rig, bring_all
from tests.fake_streams import FakeStreams
from tests.fakes import SMALL


def test_times_are_counted_from_a_copy_that_is_not_long_ago() -> None:
    """For a device counts in float32; and they are the right times all the same."""

    class Clock(FakeStreams):
        longest = 0.0

        def seconds(self, earlier: Mark, later: Mark) -> float:
            self.longest = max(self.longest, super().seconds(earlier, later))
            return super().seconds(earlier, later)

    class Stepping(StreamCopyEngine):
        def now(self) -> float:
            """The device's."""
            return float(streams._steps)

    streams, pool, copied = Clock(random.Random(0)), SlotPool(3, SMALL), list[tuple[float, float, int]]()
    engine = Stepping(PartlyInRam(EXPERTS), pool, streams, on_copied=lambda *copy: copied.append(copy))
    for number in range(100):
        begun = streams._steps
        bring_all(engine, [engine.submit(EXPERTS[number % 8], number % 3, Priority(number % 2))])
        streams.finish()
        engine.settle()
        assert len(copied) == number + 1 and begun <= copied[-1][0] < copied[-1][1] <= streams._steps
    engine.close()
    assert 0 < streams.longest < streams._steps / 10


def test_a_copy_is_timed_before_anything_was_demanded() -> None:
    rig = Rig(PartlyInRam(in_ram=EXPERTS))
    rig.streams._order.remove(Lane.DEMAND)
    rig.bring(rig.engine.submit(EXPERTS[0], 0, PREFETCH))
    rig.streams._order.append(Lane.DEMAND)
    rig.engine.close()
    assert len(rig.copied) == 1
