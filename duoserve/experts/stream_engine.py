"""Copies to a device that works behind the host: nobody waits for them but the device's own lanes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor

from duoserve.errors import ClosedError, ConfigError, CopyError
from duoserve.experts.copy_engine import CopyEngine, CopyListener
from duoserve.experts.layout import ExpertId
from duoserve.experts.pinned import pin, unpin
from duoserve.experts.rows import aligned_rows
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.streams import Lane, Mark, Streams
from duoserve.experts.tickets import PIECE_BYTES, Priority, Ticket, TicketQueue

PIECES_IN_FLIGHT = 2  # one is being copied and the next stands behind it, so that the link never idles

StallListener = Callable[[float], None]  # told for how many seconds the compute lane waited for a copy


class _Arrival(NamedTuple):
    """Between these marks lies a copy."""

    begin: Mark
    end: Mark


class StreamCopyEngine(CopyEngine):
    """Enqueues copies on the lanes of ``streams``. A ticket is DONE once kernels that read its slot may be enqueued.

    A demand for an expert that lies in host RAM is enqueued by ``submit`` itself, on a lane of its own. ``num_threads``
    threads carry out all else: prefetches from RAM, of which at most PIECES_IN_FLIGHT pieces of ``piece_bytes`` stand
    on their lane at a time, and reads from the disk, through a row of their own, page-locked if ``pinned``. A copy into
    a slot starts after the kernels before its ``fence``. ``wait`` makes the compute lane wait, and
    the host only for copies that no thread has enqueued yet.
    """

    def __init__(  # noqa: PLR0913
        self,
        store: ExpertStore,
        pool: SlotPool,
        streams: Streams,
        *,
        num_threads: int = 2,
        piece_bytes: int = PIECE_BYTES,
        pinned: bool = False,
        on_copied: CopyListener | None = None,
        on_stalled: StallListener | None = None,
    ) -> None:
        if num_threads < 1:
            raise ConfigError(f"copy_threads is {num_threads}, but at least 1 thread has to copy")
        self._store = store
        self._pool = pool
        self._streams = streams
        self._piece_bytes = piece_bytes
        self._on_copied = on_copied
        self._on_stalled = on_stalled
        self._queue = TicketQueue()
        self._arrivals: dict[Ticket, _Arrival] = {}  # enqueued and not DONE, in the order of enqueueing
        self._unreported: deque[_Arrival] = deque()
        self._stalls: deque[tuple[Mark, Mark]] = deque()
        self._readers: dict[int, Mark] = {}  # by slot: where its last readers end
        self._closed = False
        self._origin = streams.mark(Lane.DEMAND)
        streams.wait(self._origin)  # times are counted from it in every lane, which may be ahead of this one
        self._origin_s = self.now()
        lock = threading.RLock()
        self._queued = threading.Condition(lock)  # a ticket can be taken, or the engine closes
        self._changed = threading.Condition(lock)  # a ticket has been enqueued or has finished
        self._staging_NB = aligned_rows(num_threads, store.layout.slot_bytes)
        self._pinned = pinned and pin(self._staging_NB)
        self._threads = [
            threading.Thread(target=self._work, args=(row_B,), name=f"duoserve-copy-{i}", daemon=True)
            for i, row_B in enumerate(self._staging_NB)
        ]
        for thread in self._threads:
            thread.start()

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def submit(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        """As in CopyEngine."""
        ticket = Ticket(expert, slot, priority, self._store.layout.slot_bytes, self.now())
        with self._queued:
            if self._closed:
                raise ClosedError(f"a copy of expert {expert.layer}/{expert.expert} was asked for after close()")
            if not self._enqueue_at_once(ticket):
                self._queue.push(ticket)
                self._queued.notify()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """As in CopyEngine; what is left of a prefetch that has begun goes on as a demand."""
        with self._queued:
            if ticket.finished or ticket.priority is Priority.DEMAND:
                return
            if not self._queue.discard(ticket):
                ticket.priority = Priority.DEMAND
                return
            ticket.priority = Priority.DEMAND
            if not self._enqueue_at_once(ticket):
                self._queue.push(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        """As in CopyEngine."""
        with self._changed:
            if not self._queue.discard(ticket):
                return False
            ticket.cancel(self.now())
            self._changed.notify_all()
            return True

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        """As in CopyEngine; of copies that are on their way, the compute lane waits for the one enqueued first."""
        with self._changed:
            while tickets:
                self._reap()
                if finished := [ticket for ticket in tickets if ticket.finished]:
                    return finished
                enqueued = next((ticket for ticket in self._arrivals if ticket in tickets), None)
                if enqueued is None:
                    self._changed.wait()
                else:
                    self._join(enqueued)
            return []

    def fence(self, slots: Collection[int]) -> None:
        """As in CopyEngine: what the compute lane has been filled with so far may read these slots."""
        mark = self._streams.mark(Lane.COMPUTE)
        with self._changed:
            self._readers.update(dict.fromkeys(slots, mark))

    def settle(self) -> None:
        """Tickets whose copies have been made are DONE, and what was measured is reported."""
        with self._changed:
            self._reap()

    def close(self) -> None:
        """As in CopyEngine."""
        with self._queued:
            self._closed = True
            for ticket in self._queue.clear():
                ticket.cancel(self.now())
            self._queued.notify_all()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for arrival in [*self._arrivals.values(), *self._unreported]:
            self._streams.wait(arrival.end)
        self.settle()
        if self._pinned:
            unpin(self._staging_NB)
            self._pinned = False

    def _enqueue_at_once(self, ticket: Ticket) -> bool:
        """Enqueues a demand whose expert lies in RAM; False for any other ticket."""
        row_B = self._store.host_row(ticket.expert) if ticket.priority is Priority.DEMAND else None
        if row_B is None:
            return False
        ticket.start(self.now())
        self._arrived(ticket, self._copy(ticket, row_B, ticket.nbytes))
        return True

    def _copy(self, ticket: Ticket, row_B: Tensor, piece_bytes: int) -> _Arrival:
        """Enqueues the copy in pieces, behind the slot's last readers."""
        with self._changed:
            readers = self._readers.pop(ticket.slot, None)
        lane = _lane(ticket)
        if readers is not None:
            self._streams.after(lane, readers)
        begin = self._streams.mark(lane)
        in_flight: deque[Mark] = deque()
        target_B = self._pool.row(ticket.slot)
        try:
            for start in range(0, ticket.nbytes, piece_bytes):
                if len(in_flight) == PIECES_IN_FLIGHT:
                    self._streams.wait(in_flight.popleft())
                if lane is not _lane(ticket):  # it has been promoted meanwhile
                    lane = _lane(ticket)
                    self._streams.after(lane, in_flight[-1] if in_flight else begin)
                stop = min(start + piece_bytes, ticket.nbytes)
                self._streams.copy(lane, target_B[start:stop], row_B[start:stop])
                in_flight.append(self._streams.mark(lane))
        except BaseException:
            for mark in in_flight:  # the slot and the row are about to be somebody else's
                self._streams.wait(mark)
            raise
        return _Arrival(begin, in_flight[-1])

    def _arrived(self, ticket: Ticket, arrival: _Arrival) -> None:
        with self._changed:
            self._arrivals[ticket] = arrival
            self._changed.notify_all()

    def _join(self, ticket: Ticket) -> None:
        """Makes the compute lane wait for the copy, and takes note of for how long it does."""
        before = self._streams.mark(Lane.COMPUTE)
        self._streams.after(Lane.COMPUTE, self._arrivals[ticket].end)
        self._stalls.append((before, self._streams.mark(Lane.COMPUTE)))
        self._finish(ticket)

    def _finish(self, ticket: Ticket) -> None:
        self._unreported.append(self._arrivals.pop(ticket))
        ticket.finish(self.now())

    def _reap(self) -> None:
        for ticket in [ticket for ticket, arrival in self._arrivals.items() if self._streams.passed(arrival.end)]:
            self._finish(ticket)
        while self._unreported and self._streams.passed(self._unreported[0].end):
            self._report(self._unreported.popleft())
        while self._stalls and self._streams.passed(self._stalls[0][1]):
            before, after = self._stalls.popleft()
            if self._on_stalled is not None:
                self._on_stalled(self._streams.seconds(before, after))

    def _report(self, arrival: _Arrival) -> None:
        if self._on_copied is not None:
            begin_s, end_s = (self._origin_s + self._streams.seconds(self._origin, mark) for mark in arrival)
            self._on_copied(begin_s, end_s, self._store.layout.slot_bytes)

    def _work(self, staging_B: Tensor) -> None:
        while (ticket := self._take()) is not None:
            error = self._carry_out(ticket, staging_B)
            if error is not None:
                with self._changed:
                    ticket.finish(self.now(), error)
                    self._changed.notify_all()

    def _take(self) -> Ticket | None:
        """The next ticket, RUNNING; blocks while there is none. None once the engine is closed."""
        with self._queued:
            while (whole := self._queue.take(self._may_start) or self._queue.take()) is None:
                if self._closed:
                    return None
                self._queued.wait()
            whole.ticket.start(self.now())
            return whole.ticket

    def _may_start(self, ticket: Ticket) -> bool:
        """Whether the copy would hold up none behind it on its lane: no kernel reads the slot, or it is a demand."""
        readers = self._readers.get(ticket.slot)
        return ticket.priority is Priority.DEMAND or readers is None or self._streams.passed(readers)

    def _carry_out(self, ticket: Ticket, staging_B: Tensor) -> CopyError | None:
        try:
            row_B = self._store.host_row(ticket.expert)
            if row_B is None:
                self._store.read(ticket.expert, staging_B)
            arrival = self._copy(ticket, staging_B if row_B is None else row_B, self._piece_bytes)
            self._arrived(ticket, arrival)
            if row_B is None:
                self._streams.wait(arrival.end)  # the next read overwrites the staging row
        except BaseException as error:  # whatever it is: a thread that ends here leaves its waiters waiting for ever
            return ticket.failure(error)
        return None


def _lane(ticket: Ticket) -> Lane:
    return Lane.DEMAND if ticket.priority is Priority.DEMAND else Lane.PREFETCH
