"""Copies to a device that works behind the host: only the device's own lanes wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from torch import Tensor

from duoserve.errors import ClosedError, ConfigError, CopyError
from duoserve.experts.copy_engine import CopyEngine, CopyListener, started
from duoserve.experts.lane_copies import LaneCopies, LaneCopy
from duoserve.experts.lane_marks import StallListener
from duoserve.experts.layout import ExpertId
from duoserve.experts.pinned import pin, unpin
from duoserve.experts.rows import aligned_rows
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.streams import Lane, Mark, Streams
from duoserve.experts.tickets import PIECE_BYTES, CopyPiece, Priority, Ticket, TicketQueue, TicketState


class StreamCopyEngine(CopyEngine):
    """Enqueues copies on the lanes of ``streams``. A ticket is DONE once kernels that read its slot may be enqueued.

    A demand for an expert that lies in host RAM is enqueued by ``ask`` itself, on a lane of its own. ``num_threads``
    threads carry out all else: prefetches, of which at most ``piece_bytes`` stand on their lane at a time, and reads
    from the disk, through a row of their own, page-locked if ``pinned``. What has not been enqueued of a prefetch can
    be promoted or cancelled. A copy into a slot starts after the kernels before its ``fence``. ``wait`` makes the
    compute lane wait, and the host only for copies that no thread has enqueued yet. One thread is enough where no more
    can be had; CopyError without any.
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
        self._streams = streams
        self._slot_bytes = store.layout.slot_bytes
        self._queue = TicketQueue()
        self._lanes = LaneCopies(pool, streams, self.now, piece_bytes, on_copied, on_stalled)
        self._closed = False
        self._lock = threading.RLock()
        self._queued = threading.Condition(self._lock)  # a ticket can be taken, or the engine closes
        self._changed = threading.Condition(self._lock)  # a ticket has been enqueued or has finished
        self._staging_NB = aligned_rows(num_threads, self._slot_bytes)
        self._pinned = pinned and pin(self._staging_NB)
        self._threads: list[threading.Thread] = []
        try:
            self._start_threads()
        except BaseException:
            self.close()
            raise

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def ticket(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        return Ticket(expert, slot, priority, self._slot_bytes, self.now())

    def ask(self, ticket: Ticket) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError(f"a copy of {ticket.expert} was asked for after close()")
            self._put(ticket)

    def promote(self, ticket: Ticket) -> None:
        """As in CopyEngine; what is left of a prefetch that has begun goes on as a demand."""
        with self._lock:
            if ticket.finished or ticket.priority is Priority.DEMAND:
                return
            queued = self._queue.discard(ticket)
            ticket.priority = Priority.DEMAND
            if queued:
                self._put(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if not (self._queue.withdraw(ticket) or self._lanes.stop(ticket)):
                return False
            ticket.cancel(self.now())
            self._changed.notify_all()
            return True

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        """As in CopyEngine; of copies that are on their way, the compute lane waits for the one enqueued first."""
        with self._lock:
            while tickets:
                if finished := [ticket for ticket in tickets if ticket.finished]:
                    return finished
                enqueued = self._lanes.first_of(tickets)
                if enqueued is None:
                    self._changed.wait()
                else:
                    self._lanes.join(enqueued)
            return []

    def fence(self, slots: Collection[int]) -> None:
        """As in CopyEngine: what the compute lane has been filled with so far may read these slots."""
        mark = self._streams.mark(Lane.COMPUTE)
        with self._lock:
            self._lanes.fence(slots, mark)

    def land(self) -> None:
        with self._lock:
            self._lanes.land()

    def settle(self) -> None:
        """Tickets whose copies have been made are DONE, and what was measured is reported."""
        with self._lock:
            self._lanes.reap()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for ticket in self._queue.clear():
                ticket.cancel(self.now())
            self._queued.notify_all()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for end in self._lanes.ends():
            self._streams.wait(end)
        self.settle()
        if self._pinned:
            unpin(self._staging_NB)
            self._pinned = False

    def _start_threads(self) -> None:
        """Starts one for each staging row, or as many as can be had; CopyError without any."""
        for number, row_B in enumerate(self._staging_NB):
            thread = threading.Thread(target=self._work, args=(row_B,), name=f"duoserve-copy-{number}", daemon=True)
            if not started(thread, self._threads):
                return
            self._threads.append(thread)

    def _put(self, ticket: Ticket) -> None:
        """Enqueues it or puts it into the queue. If the device fails, it is FAILED: no wait for it is endless."""
        try:
            if not self._enqueue_at_once(ticket):
                self._queue.push(ticket)
                self._queued.notify()
        except BaseException as error:
            if not (self._lanes.arrives(ticket) or ticket in self._queue):  # else it goes on, whatever came behind
                self._lanes.drop(ticket)
                ticket.finish(self.now(), ticket.failure(error))
                self._changed.notify_all()
            raise

    def _enqueue_at_once(self, ticket: Ticket) -> bool:
        """Enqueues a demand whose expert lies in RAM; False for any other ticket."""
        row_B = self._store.host_row(ticket.expert) if ticket.priority is Priority.DEMAND else None
        if row_B is None:
            return False
        ticket.start(self.now())
        self._copy(ticket, row_B)
        return True

    def _copy(self, ticket: Ticket, row_B: Tensor, read: bool = False) -> Mark:
        """Enqueues the copy behind all that uses the slot, until it is cancelled; returns where it ends on its lane."""
        with self._lock:
            copy = self._lanes.begin(ticket, read)
        try:
            while ticket.sent < ticket.nbytes and ticket.state is not TicketState.CANCELLED:
                in_the_way = self._enqueue(ticket, copy, row_B)
                if in_the_way is not None:
                    self._streams.wait(in_the_way)
        except BaseException:
            # The slot and the row are about to be reused, and what was enqueued last may be behind ``copy.end``.
            self._streams.wait(self._streams.mark(copy.lane))
            raise
        finally:
            with self._lock:
                self._lanes.drop(ticket)
        return copy.end

    def _enqueue(self, ticket: Ticket, copy: LaneCopy, row_B: Tensor) -> Mark | None:
        """Enqueues a part of the copy, unless it is cancelled; returns the mark that must pass before, if any."""
        with self._lock:
            if ticket.state is TicketState.CANCELLED:
                return None
            in_the_way = self._lanes.enqueue(ticket, copy, row_B)
            if self._lanes.arrives(ticket):
                self._changed.notify_all()
            return in_the_way

    def _work(self, staging_B: Tensor) -> None:
        while (ticket := self._take()) is not None:
            error = self._carry_out(ticket, staging_B)
            if error is not None:
                with self._lock:
                    ticket.finish(self.now(), error)
                    self._changed.notify_all()

    def _take(self) -> Ticket | None:
        """The next ticket, RUNNING; blocks while there is none. None once the engine is closed."""
        with self._lock:
            while (whole := self._next()) is None:
                if self._closed:
                    return None
                self._queued.wait()
            whole.ticket.start(self.now())
            whole.ticket.sent = 0  # it has been taken, but nothing of it is on its lane yet
            return whole.ticket

    def _next(self) -> CopyPiece | None:
        """The next piece of what may start, else of all; None if there is none, or the device failed when asked."""
        try:
            return self._queue.take(self._lanes.may_start) or self._queue.take()
        except BaseException as error:  # as in _carry_out
            for ticket in self._queue.clear():
                ticket.finish(self.now(), ticket.failure(error))
            self._changed.notify_all()
            return None

    def _carry_out(self, ticket: Ticket, staging_B: Tensor) -> CopyError | None:
        try:
            row_B = self._store.host_row(ticket.expert)
            if row_B is None:
                self._store.read(ticket.expert, staging_B)
            end = self._copy(ticket, staging_B if row_B is None else row_B, read=row_B is None)
            if row_B is None:
                self._streams.wait(end)  # the next read overwrites the staging row
        except BaseException as error:  # whatever it is: a thread that ends here leaves its waiters waiting for ever
            return ticket.failure(error)
        return None
