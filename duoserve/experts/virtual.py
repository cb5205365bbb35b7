"""A copy engine on a virtual clock: schedules run without waiting, and copies arrive in any order a test wants."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from duoserve.errors import ClosedError, CopyError, IntegrityError
from duoserve.experts.copy_engine import CopyEngine, CopyListener
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.tickets import Priority, Ticket, TicketQueue


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def advance(self, dt: float) -> None:
        """Lets ``dt`` seconds pass; ValueError if that goes back in time."""
        if not dt >= 0:
            raise ValueError(f"time cannot advance by {dt} seconds")
        self.now += dt

    def advance_to(self, when: float) -> None:
        """Lets time pass until ``when``; nothing happens if it is past already."""
        self.now = max(self.now, when)


class VirtualCopyEngine(CopyEngine):
    """One link that carries one copy after another, each for ``seconds(nbytes)``; for one thread.

    ``wait`` advances the clock to the completion that it waits for. Copies that fell due while somebody else advanced
    the clock finish at their own time, at the latest in the next call. With ``store`` and ``pool`` (both or neither)
    the bytes are really copied, at completion, so that reading a slot too early shows. Without them an expert is
    ``nbytes`` bytes. With ``shuffle`` the link draws its next copy from all that are queued, whatever their priority,
    and decides only when time moves, so that copies asked for at one instant complete in any order.
    """

    def __init__(  # noqa: PLR0913
        self,
        clock: VirtualClock,
        seconds: Callable[[int], float],
        store: ExpertStore | None = None,
        pool: SlotPool | None = None,
        shuffle: random.Random | None = None,
        *,
        nbytes: int = 0,
        on_copied: CopyListener | None = None,
    ) -> None:
        if (store is None) != (pool is None):
            raise ValueError("store and pool go together: give both or neither")
        self._clock = clock
        self._seconds = seconds
        self._store = store
        self._pool = pool
        self._shuffle = shuffle
        self._nbytes = nbytes if store is None else store.layout.slot_bytes
        self._on_copied = on_copied
        self._queue = TicketQueue()
        self._running: Ticket | None = None
        self._due = 0.0  # when the running copy completes
        self._free_at = 0.0  # when the link began the running copy, or could have begun the next
        self._closed = False

    def now(self) -> float:
        """Seconds of the virtual clock."""
        return self._clock.now

    def submit(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        """As in CopyEngine."""
        if self._closed:
            raise ClosedError(f"a copy of expert {expert.layer}/{expert.expert} was asked for after close()")
        self.settle()
        if self._running is None and not self._queue:
            self._free_at = self.now()
        ticket = Ticket(expert, slot, priority, self._nbytes, self.now())
        self._queue.push(ticket)
        self.settle()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """As in CopyEngine."""
        self.settle()
        self._queue.promote(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        """As in CopyEngine."""
        self.settle()
        if not self._queue.discard(ticket):
            return False
        ticket.cancel(self.now())
        return True

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        """As in CopyEngine; IntegrityError for unfinished tickets of another engine, which would take for ever."""
        self.settle()
        while not (finished := [ticket for ticket in tickets if ticket.finished]) and tickets:
            if self._running is None and self._start() is None:
                raise IntegrityError(f"wait for {len(tickets)} copies, none of which was asked of this engine")
            self._clock.advance_to(self._due)
            self.settle()
        return finished

    def settle(self) -> None:
        """Completes what is due by now, each copy at its own time."""
        while (ticket := self._on_link()) is not None and self._due <= self.now():
            self._complete(ticket)

    def close(self) -> None:
        """As in CopyEngine; the clock advances to the end of the running copy."""
        self.settle()
        self._closed = True
        while (ticket := self._queue.pop()) is not None:
            ticket.cancel(self.now())
        if self._running is not None:
            self._clock.advance_to(self._due)
            self.settle()

    def _on_link(self) -> Ticket | None:
        """The running copy, if need be the next one, which then began when the link was free; None on an idle link."""
        may_start = self._shuffle is None or self._free_at < self.now()
        return self._start() if self._running is None and may_start else self._running

    def _start(self) -> Ticket | None:
        """Puts the next copy on the idle link; None when there is none."""
        ticket = self._queue.pop() if self._shuffle is None else self._queue.draw(self._shuffle)
        if ticket is not None:
            ticket.start(self._free_at)
            self._due = self._free_at + self._seconds(ticket.nbytes)
        self._running = ticket
        return ticket

    def _complete(self, ticket: Ticket) -> None:
        error = self._copy(ticket)
        if error is None and self._on_copied is not None:
            self._on_copied(self._free_at, self._due, ticket.nbytes)
        ticket.finish(self._due, error)
        self._running = None
        self._free_at = self._due

    def _copy(self, ticket: Ticket) -> CopyError | None:
        if self._store is None or self._pool is None:
            return None
        try:
            self._store.read(ticket.expert, self._pool.row(ticket.slot))
        except Exception as error:
            return ticket.failure(error)
        return None
