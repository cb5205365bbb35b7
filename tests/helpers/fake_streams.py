"""A device without a device: lanes of closures that run when somebody waits, in any order that the marks allow."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable

from torch import Tensor

from duoserve.experts.layout import ExpertLayout
from duoserve.experts.slots import SlotPool
from duoserve.experts.streams import Lane, Mark, Streams

CHANGE_OF_MIND = 0.2  # how likely another lane comes first at a step: a lane may starve for long


class FakeMark(Mark):
    """``passed_at`` is the number of the step that passed it."""

    def __init__(self) -> None:
        self.passed_at: int | None = None


class FakeStreams(Streams):
    """Nothing runs until it must, and then whatever ``rng`` picks: what no mark holds back will run too early.

    With ``host_computes`` the kernels are made by the host itself, as on a CPU: it blocks where COMPUTE would wait.
    A second is a step.
    """

    def __init__(self, rng: random.Random, host_computes: bool = False) -> None:
        self._rng = rng
        self.host_computes = host_computes
        self._lanes: dict[Lane, deque[Callable[[], bool]]] = {lane: deque() for lane in Lane}
        self._order = list(Lane)
        self._steps = 0
        self._lock = threading.RLock()

    def run(self, kernel: Callable[[], None]) -> None:
        """Enqueues a kernel on COMPUTE."""
        self._enqueue(Lane.COMPUTE, kernel)

    def mark(self, lane: Lane) -> FakeMark:
        mark = FakeMark()

        def pass_by() -> None:
            mark.passed_at = self._steps

        self._enqueue(lane, pass_by)
        return mark

    def after(self, lane: Lane, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        if lane is Lane.COMPUTE and self.host_computes:
            self.wait(mark)
        with self._lock:
            self._lanes[lane].append(lambda: mark.passed_at is not None)

    def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
        self._enqueue(lane, lambda: target_B.copy_(source_B))

    def passed(self, mark: Mark) -> bool:
        assert isinstance(mark, FakeMark)
        with self._lock:
            for _ in range(self._rng.randrange(3)):
                self._step()
            return mark.passed_at is not None

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        with self._lock:
            while mark.passed_at is None:
                assert self._step(), "the lanes wait for each other for ever"

    def seconds(self, earlier: Mark, later: Mark) -> float:
        assert isinstance(earlier, FakeMark) and isinstance(later, FakeMark)
        assert earlier.passed_at is not None and later.passed_at is not None
        return float(later.passed_at - earlier.passed_at)

    def finish(self) -> None:
        """Runs all that has been enqueued."""
        with self._lock:
            while any(self._lanes.values()):
                assert self._step(), "the lanes wait for each other for ever"

    def _enqueue(self, lane: Lane, work: Callable[[], object]) -> None:
        def runs() -> bool:
            work()
            return True

        with self._lock:
            self._lanes[lane].append(runs)

    def _step(self) -> bool:
        """Runs the head of some lane; False when every lane is empty or held back."""
        self._steps += 1
        if self._rng.random() < CHANGE_OF_MIND:
            self._rng.shuffle(self._order)
        for lane in self._order:
            if self._lanes[lane] and self._lanes[lane][0]():
                self._lanes[lane].popleft()
                return True
        return False


class LaggingPool(SlotPool):
    """Scrubs as a device does: when its turn comes on the compute lane."""

    def __init__(self, num_slots: int, layout: ExpertLayout, streams: FakeStreams) -> None:
        super().__init__(num_slots, layout, poison=True)
        self._streams = streams

    def scrub(self, slot: int) -> bool:
        scrub = super().scrub
        self._streams.run(lambda: scrub(slot))
        return True
