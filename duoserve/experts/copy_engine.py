"""Copies of experts into slots, with priorities and tickets: what every engine offers, and the one of host threads."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sized

from duoserve.errors import ClosedError, ConfigError, CopyError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.tickets import Priority, Ticket, TicketQueue

# Called for everything that was copied: with when that began and ended (seconds on the engine's clock), and its bytes.
# Copy threads count from when they were asked: their wake-up is part of the copy, and the lane is busy while one is
# outstanding.
CopyListener = Callable[[float, float, int], None]
# A thread ends that has had nothing to copy for this long; the next copy starts another. A store that computes, as one
# that quantizes does, leaves each thread that it ran on a team of OpenMP threads, and where all teams have more threads
# than there are CPUs, OpenMP's threads sleep between two operations: a decode step then takes twice as long.
IDLE_SECONDS = 1.0


class CopyEngine(ABC):
    """Brings experts into slots. Demands go before prefetches, oldest first.

    An engine that carries prefetches in pieces (see TicketQueue) lets demands overtake between two of them; what is on
    its way is never interrupted. The caller gives a slot to one ticket at a time, and calls ``fence`` for the work that
    may read it before asking for the next copy into it.
    """

    @abstractmethod
    def now(self) -> float:
        """Seconds on the clock of this engine's tickets."""

    @abstractmethod
    def ticket(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        """A copy of ``expert`` into ``slot`` that can be asked for."""

    @abstractmethod
    def ask(self, ticket: Ticket) -> None:
        """Asks for this copy; ClosedError after close(), CopyError without a thread.

        After any exception or interrupt, a caller that recorded the ticket first can still ``cancel`` it, or, if that
        returns False, ``wait`` for it.
        """

    def submit(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        """Makes a ticket and asks for it, where it need not be recorded first; raises what ``ask`` does."""
        ticket = self.ticket(expert, slot, priority)
        self.ask(ticket)
        return ticket

    @abstractmethod
    def promote(self, ticket: Ticket) -> None:
        """Turns what is queued of a prefetch into the last of the demands; does nothing for any other ticket."""

    @abstractmethod
    def cancel(self, ticket: Ticket) -> bool:
        """Cancels what has not been sent: the ticket is CANCELLED. False if nothing was left, and then nothing changes.

        The slot may be reused at once: a piece on its way lands before the next ticket's first.
        """

    @abstractmethod
    def fence(self, slots: Collection[int]) -> None:
        """The work launched so far may use ``slots``: no copy into one of them starts before that work has ended."""

    @abstractmethod
    def land(self) -> None:
        """Work launched from now on starts after all pieces of cancelled copies that are on their way have landed."""

    @abstractmethod
    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        """Blocks until one of ``tickets`` is finished, then returns all finished ones in the order given.

        Empty for no tickets. A failed copy does not raise here: look at ``state`` and ``error``.
        """

    @abstractmethod
    def settle(self) -> None:
        """Brings the states of tickets up to ``now()`` in an engine that has no threads of its own."""

    @abstractmethod
    def close(self) -> None:
        """Cancels what is queued and waits for what is running; idempotent."""


def started(thread: threading.Thread, others: Sized) -> bool:
    """Starts ``thread``; False if no more can be had and the ``others`` must do, CopyError if there are no others."""
    try:
        thread.start()
    except RuntimeError as error:
        if others:
            return False
        raise CopyError(f"no thread can be had to copy experts ({error}): allow this process more") from error
    return True


class ThreadedCopyEngine(CopyEngine):
    """Worker threads that read from ``store`` into ``pool``, one whole expert each at a time; use it from any thread.

    Whatever a read raises becomes its ticket's ``error``, and the thread goes on. ``on_copied`` runs in the worker,
    before the ticket is DONE. ConfigError for less than one thread.
    """

    def __init__(
        self, store: ExpertStore, pool: SlotPool, num_threads: int = 2, on_copied: CopyListener | None = None
    ) -> None:
        if num_threads < 1:
            raise ConfigError(f"copy_threads is {num_threads}, but at least 1 thread has to copy")
        self._store = store
        self._pool = pool
        self._on_copied = on_copied
        self._num_threads = num_threads
        self._queue = TicketQueue()
        self._closed = False
        # It is entered itself, not by way of a condition: an interrupt within Condition.__exit__ would leave it locked.
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)  # a ticket can be taken, or the engine closes
        self._finished = threading.Condition(self._lock)  # a ticket has finished
        self._threads: set[threading.Thread] = set()

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def ticket(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        return Ticket(expert, slot, priority, self._store.layout.slot_bytes, self.now())

    def ask(self, ticket: Ticket) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError(f"a copy of {ticket.expert} was asked for after close()")
            self._start_threads()
            self._queue.push(ticket)
            self._queued.notify()

    def promote(self, ticket: Ticket) -> None:
        with self._lock:
            self._queue.promote(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if not self._queue.withdraw(ticket):
                return False
            ticket.cancel(self.now())
            self._finished.notify_all()
            return True

    def fence(self, slots: Collection[int]) -> None:
        """Nothing: work on the host has ended when the call that did it returns."""

    def land(self) -> None:
        """Nothing: a copy that a thread has begun cannot be cancelled."""

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        with self._lock:
            while not (finished := [ticket for ticket in tickets if ticket.finished]) and tickets:
                self._finished.wait()
            return finished

    def settle(self) -> None:
        """Nothing: the threads keep the tickets' states."""

    def close(self) -> None:
        """As in CopyEngine; ends the threads and wakes every waiter."""
        with self._lock:
            self._closed = True
            for ticket in self._queue.clear():
                ticket.cancel(self.now())
            self._queued.notify_all()
            self._finished.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _start_threads(self) -> None:
        """Starts those that are missing; one is enough where no more can be had. CopyError without any."""
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._work, name="duoserve-copy", daemon=True)
            if not started(thread, self._threads):
                return
            self._threads.add(thread)

    def _work(self) -> None:
        while (ticket := self._take()) is not None:
            error = self._copy(ticket)
            with self._lock:
                ticket.finish(self.now(), error)
                self._finished.notify_all()

    def _take(self) -> Ticket | None:
        """The next ticket, RUNNING; blocks while there is none. None for a thread that is no longer needed."""
        with self._lock:
            needed = True
            while (whole := self._queue.take()) is None:
                if self._closed or not needed:
                    self._threads.discard(threading.current_thread())  # an interrupt may have kept it from these
                    return None
                needed = self._queued.wait(IDLE_SECONDS)
            whole.ticket.start(self.now())
            return whole.ticket

    def _copy(self, ticket: Ticket) -> CopyError | None:
        try:
            self._store.read(ticket.expert, self._pool.row(ticket.slot))
            if self._on_copied is not None:
                self._on_copied(ticket.issued_at, self.now(), ticket.nbytes)
        except BaseException as error:  # whatever it is: a thread that ends here leaves its waiters waiting for ever
            return ticket.failure(error)
        return None
