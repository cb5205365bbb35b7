"""Copies that fail on a device that lags behind: whoever waits hears of it, and nothing lands in another's slot."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch import Tensor

from duoserve.errors import CopyError
from duoserve.experts.slots import SlotPool
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.streams import Lane, Mark
from duoserve.experts.tickets import TicketState
from tests.experts.test_copy_engine import in_background, joined
from tests.experts.test_stream_engine import DEMAND, EXPERTS, PIECE, PREFETCH, PartlyInRam, Rig, bring_all
from tests.helpers.fake_streams import FakeStreams
from tests.helpers.fakes import SMALL
from tests.helpers.live_threads import threads_since


@pytest.mark.parametrize("seed", range(20))
def test_what_a_failed_copy_left_on_its_way_does_not_land_in_anothers_slot(seed: int) -> None:
    class Failing(FakeStreams):
        copies = 0

        def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
            self.copies += 1
            if self.copies == 3:
                raise RuntimeError("injected")
            super().copy(lane, target_B, source_B)

    store, pool, streams = PartlyInRam(EXPERTS), SlotPool(1, SMALL, poison=True), Failing(random.Random(seed))
    engine = StreamCopyEngine(store, pool, streams, num_threads=1, piece_bytes=PIECE)
    bad = engine.submit(EXPERTS[0], 0, PREFETCH)
    while not bad.finished:
        engine.wait([bad])
    good = engine.submit(EXPERTS[1], 0, DEMAND)
    while not good.finished:
        engine.wait([good])
    engine.close()
    streams.finish()
    assert (bad.state, good.state) == (TicketState.FAILED, TicketState.DONE)
    assert torch.equal(pool.row(0), store.row(EXPERTS[1]))


@pytest.mark.parametrize("promoted", [True, False])
def test_a_demand_that_the_device_refuses_is_not_waited_for_in_vain(promoted: bool) -> None:
    """Neither one that was a prefetch in the queue, nor one that was noted by whoever asked for it."""

    class Failing(FakeStreams):
        def copy(self, lane: Lane, target_B: Tensor, source_B: Tensor) -> None:
            if lane is Lane.DEMAND:
                raise RuntimeError("injected")
            super().copy(lane, target_B, source_B)

    store, pool = PartlyInRam(EXPERTS[:7]), SlotPool(2, SMALL)
    engine = StreamCopyEngine(store, pool, Failing(random.Random(0)), num_threads=1)
    gate = store.gate(EXPERTS[7])
    busy = engine.submit(EXPERTS[7], 1, PREFETCH)
    gate.wait_entered()
    ticket = engine.ticket(EXPERTS[0], 0, PREFETCH if promoted else DEMAND)
    if promoted:
        engine.ask(ticket)
    with pytest.raises(RuntimeError, match="injected"):
        engine.promote(ticket) if promoted else engine.ask(ticket)
    waiter = in_background(lambda: engine.wait([ticket]))
    assert joined(waiter) and not engine.cancel(ticket)
    assert ticket.state is TicketState.FAILED and "expert 0/0" in str(ticket.error) and "injected" in str(ticket.error)
    gate.open()
    bring_all(engine, [busy])
    engine.close()


def test_a_failed_read_ends_its_ticket_and_nothing_else() -> None:
    rig = Rig(PartlyInRam(in_ram=(), fail_on=[EXPERTS[6]]))
    bad, good = (rig.engine.submit(EXPERTS[number], slot, DEMAND) for slot, number in enumerate((6, 7)))
    rig.bring(bad)
    rig.bring(good)
    assert (bad.state, good.state) == (TicketState.FAILED, TicketState.DONE)
    assert "expert 0/6" in str(bad.error)
    rig.engine.close()


def test_a_device_that_fails_when_asked_fails_those_that_wait_and_the_thread_goes_on() -> None:
    class Asked(FakeStreams):
        broken = False

        def passed(self, mark: Mark) -> bool:
            if self.broken:
                raise RuntimeError("an illegal memory access was encountered")
            return super().passed(mark)

    store, pool, streams = PartlyInRam(EXPERTS[:7]), SlotPool(3, SMALL), Asked(random.Random(0))
    engine = StreamCopyEngine(store, pool, streams, num_threads=1)
    gate = store.gate(EXPERTS[7])
    busy = engine.submit(EXPERTS[7], 2, DEMAND)
    gate.wait_entered()
    engine.fence([0])
    lost = [engine.submit(EXPERTS[number], 0, PREFETCH) for number in (0, 1)]
    streams.broken = True
    gate.open()
    bring_all(engine, [busy, *lost])
    streams.broken = False
    right = engine.submit(EXPERTS[2], 1, PREFETCH)
    bring_all(engine, [right])
    engine.close()
    assert [ticket.state for ticket in (busy, *lost, right)] == [
        TicketState.DONE, TicketState.FAILED, TicketState.FAILED, TicketState.DONE,
    ]  # fmt: skip
    assert "expert 0/1" in str(lost[1].error) and "illegal memory access" in str(lost[1].error)


@pytest.mark.parametrize("allowed", [0, 1])
def test_threads_that_cannot_be_started(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is enough; without any the engine is refused, and leaves nothing pinned."""
    start, left, pinned = threading.Thread.start, [allowed], []

    def limited(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    def pin(rows_NB: Tensor) -> bool:
        pinned.append(rows_NB)
        return True

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr("duoserve.experts.stream_engine.pin", pin)
    monkeypatch.setattr("duoserve.experts.stream_engine.unpin", lambda rows_NB: pinned.pop())
    alive, store, pool = threads_since(), PartlyInRam(in_ram=()), SlotPool(2, SMALL)

    def engine() -> StreamCopyEngine:
        return StreamCopyEngine(store, pool, FakeStreams(random.Random(0)), num_threads=2, pinned=True)

    if not allowed:
        with pytest.raises(CopyError, match="no thread can be had to copy experts"):
            engine()
    else:
        made = engine()
        tickets = [made.submit(EXPERTS[number], number, DEMAND) for number in (0, 1)]
        bring_all(made, tickets)
        assert [ticket.state for ticket in tickets] == [TicketState.DONE] * 2 and alive() == 1
        made.close()
        made.close()
    assert not pinned and alive() == 0
