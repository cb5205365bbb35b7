"""Copy threads and a host that computes, on a virtual clock: what ThreadedCopyEngine does on a CPU, without waiting."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from math import inf

from duoserve.errors import IntegrityError
from duoserve.experts.copy_engine import CopyListener
from duoserve.experts.layout import ExpertId
from duoserve.experts.tickets import Ticket, TicketQueue
from duoserve.experts.virtual import ClockedCopyEngine, ComputeLane, VirtualClock

_DONE_BYTES = 1.0  # what is less is rounding
# Memory is warm if its slot is among this number of slots that were read into or computed from last. Measured on a Xeon
# with experts of 7 MB: reads into two slots in turn are as fast as into one, and into three nearly as slow as into 16.
WARM_SLOTS = 2


@dataclass(frozen=True)
class Readers:
    """Copy threads, and how they share a disk with each other and the cores with the host. Bytes/s, seconds.

    ``alone`` is the rate of one read at a time, ``together`` that of ``threads`` at once; in between it grows evenly.
    To queue a copy takes the host ``queue_s``, or ``rouse_s`` if that wakes a thread, which begins ``wake_s`` after it
    was asked, and is ready for its next read ``between_s`` after one has ended. When the host sleeps until a copy has
    ended, it goes on ``notice_s`` later, and loses ``resumed_s`` of its next computing to caches that have gone cold.
    A read into memory that was used just before is ``warm`` times as fast, for a cache takes it.
    """

    threads: int
    alone: float
    together: float
    queue_s: float = 0.0
    rouse_s: float = 0.0
    wake_s: float = 0.0
    between_s: float = 0.0
    notice_s: float = 0.0
    resumed_s: float = 0.0
    warm: float = 1.0

    def rate(self, reads: int) -> float:
        """Bytes/s of each read where ``reads`` of them run at once."""
        beyond = (reads - 1) / (self.threads - 1) if self.threads > 1 else 0.0
        return (self.alone + beyond * (self.together - self.alone)) / reads


@dataclass(eq=False)
class _Read:
    ticket: Ticket
    started: float
    left: float  # bytes, as many as would take as long at the common rate


class VirtualReaders(ClockedCopyEngine):
    """``readers`` that carry whole experts of ``nbytes`` bytes.

    ``wait`` advances the clock, and so do ``compute`` and ``ask``. Threads of one interpreter get in each other's
    way: one that is woken keeps the host from computing for ``roused_s``, unless that sleeps then, and so does a read
    that ends while the host computes, for ``ended_s``.
    """

    def __init__(
        self, clock: VirtualClock, readers: Readers, nbytes: int, on_copied: CopyListener | None = None
    ) -> None:
        super().__init__(clock, TicketQueue(), nbytes, on_copied)
        self._readers = readers
        self._waking: list[float] = []  # when threads that do not sleep look for work, ascending
        self._reads: list[_Read] = []
        self.roused_s = 0.0
        self.ended_s = 0.0
        self._owed_s = 0.0
        self._computes = False
        self._fresh: set[ExpertId] = set()
        self._used: list[int] = []  # the slots that were used last, the last one last
        self._warm: set[Ticket] = set()  # copies, not begun yet, into such slots
        self._at = clock.now  # up to where everything has happened

    def ask(self, ticket: Ticket) -> None:
        """As in CopyEngine; wakes a thread if one sleeps."""
        self.settle()
        self._push(ticket)
        if self._use(ticket.slot):
            self._warm.add(ticket)
        if len(self._waking) + len(self._reads) < self._readers.threads:
            insort(self._waking, self.now() + self._readers.wake_s)
            self._clock.advance(self._readers.rouse_s)
            self._owed_s += self.roused_s
        else:
            self._clock.advance(self._readers.queue_s)
        self.settle()
        self._fresh.add(ticket.expert)

    def cancel(self, ticket: Ticket) -> bool:
        cancelled = super().cancel(ticket)
        if cancelled:
            self._warm.discard(ticket)
        return cancelled

    def fence(self, slots: Collection[int]) -> None:
        """Nothing: work on the host has ended when the call that did it returns."""

    def land(self) -> None:
        """Nothing: a copy that a thread has begun cannot be cancelled."""

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        """As in CopyEngine; IntegrityError for unfinished tickets of another engine, which would take for ever."""
        self.settle()
        slept = False
        while tickets and not any(ticket.finished for ticket in tickets):
            event = self._next_event()
            if event == inf:
                raise IntegrityError(f"wait for {len(tickets)} copies, none of which was asked of this engine")
            self._clock.advance_to(event)
            self.settle()
            slept = True
        if slept:
            self._owed_s = self._readers.resumed_s
            self._clock.advance(self._readers.notice_s)
            self.settle()
        return [ticket for ticket in tickets if ticket.finished]

    def settle(self) -> None:
        """Carries out what is due by now."""
        if self._waking or self._reads:
            self._run(self.now())
        self._at = max(self._at, self.now())

    def compute(self, seconds: float) -> None:
        """The host computes what takes ``seconds`` if no copy thread is in its way."""
        self.settle()
        self._computes, done_at = True, self.now() + seconds
        while True:
            done_at, self._owed_s = done_at + self._owed_s, 0.0
            self._clock.advance_to(min(done_at, self._next_event()))
            self._run(self.now())
            if self.now() >= done_at and not self._owed_s:
                break
        self._computes = False

    def touch(self, expert: ExpertId, slot: int) -> bool:
        """An expert is computed; returns whether for the first time since it was copied."""
        self._use(slot)
        fresh = expert in self._fresh
        self._fresh.discard(expert)
        return fresh

    def close(self) -> None:
        """As in CopyEngine; the clock advances to the end of what is read."""
        self._close_queue()
        while self._reads:
            self._clock.advance_to(self._next_event())
            self.settle()

    def _use(self, slot: int) -> bool:
        """Notes the slot as the one used last; returns whether it was among those used last before."""
        among = slot in self._used
        if among:
            self._used.remove(slot)
        self._used = [*self._used, slot][-WARM_SLOTS:]
        return among

    def _next_event(self) -> float:
        """When a thread looks for work or the next read ends."""
        event = self._waking[0] if self._waking else inf
        if self._reads:
            event = min(event, self._at + min(read.left for read in self._reads) / self._rate())
        return event

    def _run(self, until: float) -> None:
        """Everything up to ``until``, in the order in which it happens."""
        while True:
            event = self._next_event()
            now = min(event, until)
            if self._reads:
                carried = max(0.0, now - self._at) * self._rate()
                for read in self._reads:
                    read.left -= carried
            self._at = max(self._at, now)
            if event > until:
                return
            self._happen(self._at)

    def _rate(self) -> float:
        return self._readers.rate(len(self._reads))

    def _happen(self, now: float) -> None:
        """Ends the reads that are through, and lets threads that are awake take what is queued."""
        through = [read for read in self._reads if read.left < _DONE_BYTES]
        self._reads = [read for read in self._reads if read.left >= _DONE_BYTES]
        self._waking = sorted([*self._waking, *[now + self._readers.between_s] * len(through)])
        awake = sum(when <= now for when in self._waking)
        del self._waking[:awake]
        self._owed_s += self.ended_s * len(through) if self._computes else 0.0
        for read in through:
            read.ticket.finish(now)
            if self._on_copied is not None:
                self._on_copied(read.started, now, self._nbytes)
        for _ in range(awake):
            piece = self._queue.take()
            if piece is None:
                break
            piece.ticket.start(now)
            warm = self._readers.warm if piece.ticket in self._warm else 1.0
            self._warm.discard(piece.ticket)
            self._reads.append(_Read(piece.ticket, now, piece.nbytes / warm))


class HostLane(ComputeLane):
    """A host that computes: a launch returns when the work has ended, and copies go on meanwhile."""

    def __init__(self, clock: VirtualClock, readers: VirtualReaders) -> None:
        super().__init__(clock)
        self._readers = readers

    def launch(self, seconds: float) -> tuple[float, float]:
        """As in ComputeLane; work that copies get in the way of takes longer."""
        start = self._clock.now
        self._readers.compute(seconds)
        self.free_at = self._clock.now
        self.busy_s += self.free_at - start
        return start, self.free_at
