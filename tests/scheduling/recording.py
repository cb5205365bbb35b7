"""What a virtual link carried and what a compute lane read, and what must hold of both whatever the policy."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from typing import Any, NamedTuple

from duoserve.experts.copy_engine import CopyListener
from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Priority, Ticket, TicketState
from duoserve.experts.virtual import VirtualCopyEngine


class Carried(NamedTuple):
    """A piece that the link carried from ``start`` to ``stop``."""

    start: float
    stop: float
    ticket: Ticket
    first_byte: int
    end_byte: int


class Read(NamedTuple):
    """Kernels that read ``expert`` in ``slot`` from ``start`` to ``stop``."""

    start: float
    stop: float
    slot: int
    expert: ExpertId


class RecordingEngine(VirtualCopyEngine):
    """Remembers all tickets, since when each of them is a demand, and all that the link carried, but for failures."""

    def __init__(self, *args: Any, on_copied: CopyListener | None = None, **kwargs: Any) -> None:
        super().__init__(*args, on_copied=self._carried, **kwargs)
        self.tickets: list[Ticket] = []
        self.guesses: set[Ticket] = set()  # those that began as prefetches
        self.demanded_at: dict[Ticket, float] = {}
        self.log: list[Carried] = []
        self._listener = on_copied

    def ask(self, ticket: Ticket) -> None:
        super().ask(ticket)
        self.tickets.append(ticket)
        if ticket.priority is Priority.PREFETCH:
            self.guesses.add(ticket)
        else:
            self.demanded_at[ticket] = self.now()

    def promote(self, ticket: Ticket) -> None:
        super().promote(ticket)
        if ticket.priority is Priority.DEMAND:
            self.demanded_at.setdefault(ticket, self.now())

    def _carried(self, started: float, finished: float, nbytes: int) -> None:
        piece = self.on_link
        assert piece is not None and piece.nbytes == nbytes
        self.log.append(Carried(started, finished, piece.ticket, piece.start, piece.stop))
        if self._listener is not None:
            self._listener(started, finished, nbytes)


def busy_share(log: list[Carried]) -> float:
    """How busy the link was between the first copy and the last."""
    return sum(one.stop - one.start for one in log) / (log[-1].stop - log[0].start)


def was_prefetch(engine: RecordingEngine, one: Carried) -> bool:
    """Whether this piece began as a guess; what begins at the moment of a promotion did so before it."""
    return one.ticket in engine.guesses and one.start <= engine.demanded_at.get(one.ticket, float("inf"))


def overtakings(engine: RecordingEngine, reads: list[Read]) -> list[tuple[Ticket, int]]:
    """Demands that had to let pieces of prefetches begin before them, and how many; there should be none.

    A piece that was under way already when the demand was made is not counted: that is the one it may wait for. Nor
    are those that were carried while the demand's slot was still read.
    """
    prefetched = sorted(one.start for one in engine.log if was_prefetch(engine, one))
    read_until = _last_reads(engine, reads)
    found = []
    for one in engine.log:
        if one.end_byte == one.ticket.nbytes and one.ticket in engine.demanded_at:
            since = max(engine.demanded_at[one.ticket], read_until[one.ticket])
            begun = bisect_left(prefetched, one.start) - bisect_right(prefetched, since)
            if begun > 0:
                found.append((one.ticket, begun))
    return found


def clashes(engine: RecordingEngine, reads: list[Read]) -> list[tuple[Carried, Read]]:
    """Pieces that were carried into a slot while kernels read it; there should be none."""
    readers = _by_slot(reads)
    pairs = [(one, read) for one in engine.log for read in readers[one.ticket.slot]]
    return [(one, read) for one, read in pairs if one.start < read.stop and read.start < one.stop]


def misreadings(engine: RecordingEngine, reads: list[Read]) -> list[Read]:
    """Kernels that did not find their expert, all of it, in the slot they read; there should be none."""
    written: dict[int, list[Carried]] = defaultdict(list)
    for one in engine.log:
        written[one.ticket.slot].append(one)
    found = []
    for read in reads:
        before = [one for one in written[read.slot] if one.start < read.stop]
        if not before or not _brings(before[-1], read):
            found.append(read)
    return found


def misshapen(engine: RecordingEngine) -> list[Ticket]:
    """Tickets whose pieces are not, in order, the bytes that were sent, or that are DONE without all of them.

    There should be none. The last piece of a copy that has FAILED is not in the log.
    """
    ends = {ticket: [0] for ticket in engine.tickets}
    gaps = set()
    for one in engine.log:
        if one.first_byte != ends[one.ticket][-1]:
            gaps.add(one.ticket)
        ends[one.ticket].append(one.end_byte)
    flying = engine.on_link
    if flying is not None:
        ends[flying.ticket].append(flying.stop)
    settled = [ticket for ticket in engine.tickets if ticket.state is not TicketState.FAILED]
    short = {ticket for ticket in settled if ends[ticket][-1] != ticket.sent}
    part = {ticket for ticket in settled if ticket.state is TicketState.DONE and ticket.sent != ticket.nbytes}
    return [ticket for ticket in engine.tickets if ticket in gaps | short | part]


def _brings(one: Carried, read: Read) -> bool:
    whole = one.ticket.state is TicketState.DONE and one.end_byte == one.ticket.nbytes
    return whole and one.ticket.expert == read.expert and one.stop <= read.start


def _last_reads(engine: RecordingEngine, reads: list[Read]) -> dict[Ticket, float]:
    """By ticket, until when its slot was read by kernels that began before the copy did; 0 where by none."""
    readers = _by_slot(reads)
    until = dict.fromkeys(engine.tickets, 0.0)
    for one in engine.log:
        if one.first_byte == 0:
            stops = [read.stop for read in readers[one.ticket.slot] if read.start < one.start]
            until[one.ticket] = max(stops, default=0.0)
    return until


def _by_slot(reads: list[Read]) -> dict[int, list[Read]]:
    by_slot: dict[int, list[Read]] = defaultdict(list)
    for read in reads:
        by_slot[read.slot].append(read)
    return by_slot
