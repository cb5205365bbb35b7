"""A KeyboardInterrupt wherever Python lets one in: the books are whole behind it, and the next pass reads the truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType

import pytest
import torch

import duoserve
from duoserve.config import Phase
from duoserve.experts.copy_engine import CopyEngine, ThreadedCopyEngine
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool, SlotState
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.tickets import Ticket
from duoserve.metrics import Meter
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import get_policy
from duoserve.scheduling.scheduler import Scheduler
from duoserve.scheduling.source import ReadyExpert
from tests.helpers.fake_streams import FakeStreams, LaggingPool
from tests.helpers.fakes import SMALL, ArrayStore
from tests.helpers.interrupts import interrupted

LAYERS, EXPERTS, SLOTS = 3, 4, 7
ALL = list(range(EXPERTS))
FOLDERS = tuple(str(Path(duoserve.__file__).parent / name) for name in ("scheduling", "experts"))
EVERY = 211  # of so many calls one is interrupted; all of them would take minutes


class HalfInRam(ArrayStore):
    def host_row(self, expert: ExpertId) -> torch.Tensor | None:
        return self.row(expert) if expert.expert % 2 else None


class Rig:
    """A scheduler, and a consumer that looks at the bytes of all it is given when its turn comes."""

    def __init__(self, policy: str, lagging: bool = False, engine: type[ThreadedCopyEngine] = ThreadedCopyEngine):
        self.store = HalfInRam(SMALL, LAYERS, EXPERTS)
        self.streams = FakeStreams(random.Random(0)) if lagging else None
        self.pool: SlotPool
        self.engine: CopyEngine
        if self.streams is None:
            self.pool = SlotPool(SLOTS, SMALL, poison=True)
            self.engine = engine(self.store, self.pool, num_threads=1)
        else:
            self.pool = LaggingPool(SLOTS, SMALL, self.streams)
            self.engine = StreamCopyEngine(
                self.store, self.pool, self.streams, num_threads=1, piece_bytes=SMALL.slot_bytes // 3
            )
        shape = ModelShape(EXPERTS, 2, tuple(range(LAYERS)))
        self.scheduler = Scheduler(shape, self.pool, self.engine, get_policy(policy), Meter())
        self.wrong: list[ReadyExpert] = []
        self.num_read = 0

    def layers(self, layers: Sequence[int], wanted: list[int]) -> None:
        for layer in layers:
            with self.scheduler.acquire(layer, wanted) as lease:
                for batch in lease:
                    self.read(layer, batch)

    def read(self, layer: int, batch: list[ReadyExpert]) -> None:
        def kernel() -> None:
            for one in batch:
                self.num_read += 1
                if not torch.equal(self.pool.row(one.slot), self.store.row(ExpertId(layer, one.expert))):
                    self.wrong.append(one)

        kernel() if self.streams is None else self.streams.run(kernel)

    def decode(self, wanted: list[int]) -> None:
        self.scheduler.begin(Phase.DECODE, 1)
        try:
            self.layers(range(LAYERS), wanted)
        finally:
            self.scheduler.end()

    def prefill(self, *, paused: bool = False) -> None:
        self.scheduler.begin(Phase.PREFILL, 100)
        try:
            self.layers([0], ALL)
            if paused:
                self.scheduler.set_aside()
                self.decode([0, 3])
                self.scheduler.resume()
            self.layers(range(1, LAYERS), ALL)
        finally:
            self.scheduler.end()

    def course(self) -> None:
        self.prefill()
        self.decode([0, 1])
        self.decode([2, 1])
        self.prefill(paused=True)
        self.decode([3, 0])

    def assert_whole(self) -> None:
        """Behind an interrupt: what is left ends, the books agree, and all that is read from now on is the truth."""
        self.scheduler.end_all()
        self.scheduler.check_integrity()
        states = [self.scheduler.table.state(slot) for slot in range(SLOTS)]
        assert states.count(SlotState.LOADING) == len(self.scheduler._residency.under_way())
        if self.streams is not None:
            self.streams.finish()
        self.wrong, self.num_read = [], 0
        self.course()
        self.scheduler.check_integrity()
        if self.streams is not None:
            self.streams.finish()
        assert self.num_read == 2 * LAYERS * EXPERTS + 4 * LAYERS * 2 and not self.wrong


def within(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(FOLDERS)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what ends a generator is let through
@pytest.mark.parametrize("lagging", [False, True], ids=["threads", "lanes"])
@pytest.mark.parametrize("policy", ["lru", "on-demand", "layer-prefetch"])
def test_an_interrupt_at_any_call(policy: str, lagging: bool) -> None:
    at, reached = 1, True
    while reached:
        rig = Rig(policy, lagging)
        with closing(rig.scheduler):
            with interrupted(at, within) as interrupt:
                rig.course()
            reached = interrupt.seen >= at
            rig.assert_whole()
        at += EVERY


class Interrupting(ThreadedCopyEngine):
    """Is interrupted once when the copy of expert 1 has been asked for, behind what ``before`` does."""

    before: Callable[[], None] | None = None

    def ask(self, ticket: Ticket) -> None:
        super().ask(ticket)
        if self.before is not None and ticket.expert == (0, 1):
            self.before()
            self.before = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("busy", [True, False], ids=["queued", "running"])
def test_a_copy_that_an_interrupt_hid_is_not_made_into_anothers_slot(busy: bool) -> None:
    rig = Rig("on-demand", engine=Interrupting)
    assert isinstance(rig.engine, Interrupting)
    gate = rig.store.gate(ExpertId(0, 0) if busy else ExpertId(0, 1))
    rig.engine.before = gate.wait_entered
    with closing(rig.scheduler):
        rig.scheduler.begin(Phase.DECODE, 1)
        with pytest.raises(KeyboardInterrupt):
            rig.scheduler.acquire(0, [0, 1] if busy else [1])
        has_slot = rig.scheduler.table.slot_of(ExpertId(0, 1)) >= 0
        gate.open()
        rig.scheduler.end()
        assert has_slot == (ExpertId(0, 1) in rig.store.reads) == (not busy)
        rig.assert_whole()


def test_what_an_interrupt_kept_from_being_released_is_released_behind_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig("lru")
    release = rig.scheduler._residency.release

    def once(layer: int, batch: Sequence[ReadyExpert]) -> None:
        monkeypatch.setattr(rig.scheduler._residency, "release", release)
        raise KeyboardInterrupt

    monkeypatch.setattr(rig.scheduler._residency, "release", once)
    with closing(rig.scheduler):
        with pytest.raises(KeyboardInterrupt):
            rig.decode([0, 1])
        rig.assert_whole()


def test_an_end_that_is_interrupted_is_made_up_for_by_the_next_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("lru")
    release = rig.scheduler._residency.release

    def once(layer: int, batch: Sequence[ReadyExpert]) -> None:
        monkeypatch.setattr(rig.scheduler._residency, "release", release)
        raise KeyboardInterrupt

    with closing(rig.scheduler):
        rig.scheduler.begin(Phase.DECODE, 1)
        next(rig.scheduler.acquire(0, [0, 1]))
        monkeypatch.setattr(rig.scheduler._residency, "release", once)
        with pytest.raises(KeyboardInterrupt):
            rig.scheduler.end()
        rig.decode([2, 3])
        rig.scheduler.check_integrity()
        assert not rig.wrong
