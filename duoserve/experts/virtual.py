"""A machine on a virtual clock: schedules run without waiting, and copies arrive in any order a test wants."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from duoserve.errors import ClosedError, CopyError, IntegrityError
from duoserve.experts.copy_engine import CopyEngine, CopyListener
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.tickets import PIECE_BYTES, CopyPiece, Priority, Ticket, TicketQueue


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


class ComputeLane:
    """The compute stream of a device: work is done in the order of its launch, and the host runs ahead."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.free_at = clock.now  # when all that was launched has ended
        self.busy_s = 0.0

    def launch(self, seconds: float) -> tuple[float, float]:
        """Adds work that takes ``seconds``; returns when it starts and ends. What it reads must have arrived."""
        start = max(self.free_at, self._clock.now)
        self.free_at = start + seconds
        self.busy_s += seconds
        return start, self.free_at

    def synchronize(self) -> None:
        """The host waits for all that was launched, as it must to read a result."""
        self._clock.advance_to(self.free_at)


class ClockedCopyEngine(CopyEngine):
    """What engines on a virtual clock share: copies of ``nbytes`` bytes wait in ``queue``; for one thread.

    What falls due while other code advances the clock is carried out by the next call, with its own time.
    """

    def __init__(self, clock: VirtualClock, queue: TicketQueue, nbytes: int, on_copied: CopyListener | None) -> None:
        self._clock = clock
        self._queue = queue
        self._nbytes = nbytes
        self._on_copied = on_copied
        self._closed = False

    def now(self) -> float:
        """Seconds of the virtual clock."""
        return self._clock.now

    def ticket(self, expert: ExpertId, slot: int, priority: Priority) -> Ticket:
        return Ticket(expert, slot, priority, self._nbytes, self.now())

    def promote(self, ticket: Ticket) -> None:
        self.settle()
        self._queue.promote(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        self.settle()
        if not self._queue.withdraw(ticket):
            return False
        ticket.cancel(self.now())
        return True

    def _push(self, ticket: Ticket) -> None:
        """The copy is asked for now; ClosedError after ``close``."""
        if self._closed:
            raise ClosedError(f"a copy of {ticket.expert} was asked for after close()")
        self._queue.push(ticket)

    def _close_queue(self) -> None:
        """Takes no more copies, and cancels those that have not begun."""
        self.settle()
        self._closed = True
        for ticket in self._queue.clear():
            ticket.cancel(self.now())


class VirtualCopyEngine(ClockedCopyEngine):
    """One link that carries one piece after another, each for ``seconds(nbytes)``.

    ``wait`` advances the clock to the completion that it waits for. With ``store`` and ``pool`` (both or neither)
    the bytes are really copied, when the last piece completes, so that reading a slot too early shows. Without them an
    expert is ``nbytes`` bytes. With ``shuffle`` the link draws its next piece from all that are queued, whatever their
    priority, and decides only when time moves, so that copies asked for at one instant complete in any order. The work
    that ``fence`` waits for is that of ``lane``; a copy whose slot is still read is passed over until it is not.
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
        piece_bytes: int | None = PIECE_BYTES,
        lane: ComputeLane | None = None,
        on_copied: CopyListener | None = None,
    ) -> None:
        if (store is None) != (pool is None):
            raise ValueError("store and pool go together: give both or neither")
        expert_bytes = nbytes if store is None else store.layout.slot_bytes
        super().__init__(clock, TicketQueue(piece_bytes), expert_bytes, on_copied)
        self._seconds = seconds
        self._store = store
        self._pool = pool
        self._shuffle = shuffle
        self._lane = lane
        self._read_until: dict[int, float] = {}  # by slot, until a copy into it starts
        self.on_link: CopyPiece | None = None  # the piece that is carried; for others to read only
        self._due = 0.0  # when it completes
        self._free_at = 0.0  # when the link began it, or could have begun the next

    def ask(self, ticket: Ticket) -> None:
        self.settle()
        if self.on_link is None:
            self._free_at = self.now()
        self._push(ticket)
        self.settle()

    def fence(self, slots: Collection[int]) -> None:
        """As in CopyEngine; nothing without a lane."""
        if self._lane is not None:
            self._read_until.update(dict.fromkeys(slots, self._lane.free_at))

    def land(self) -> None:
        """Nothing: no byte shows before the last has arrived."""

    def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
        """As in CopyEngine; IntegrityError for unfinished tickets of another engine, which would take for ever."""
        self.settle()
        while not (finished := [ticket for ticket in tickets if ticket.finished]) and tickets:
            if self.on_link is None:
                if not self._queue:
                    raise IntegrityError(f"wait for {len(tickets)} copies, none of which was asked of this engine")
                self._start(self._next_start())
            self._clock.advance_to(self._due)
            self.settle()
        return finished

    def settle(self) -> None:
        """Completes what is due by now, each piece at its own time."""
        self._start_if_due()
        while self.on_link is not None and self._due <= self.now():
            self._complete(self.on_link)
            self._start_if_due()

    def close(self) -> None:
        """As in CopyEngine; the clock advances to the end of what is on the link."""
        self._close_queue()
        if self.on_link is not None:
            self._clock.advance_to(self._due)
            self.settle()

    def _start_if_due(self) -> None:
        """Puts the next piece on an idle link if that has happened by now."""
        if self.on_link is None and self._queue:
            start, now = self._next_start(), self.now()
            if start < now or (start == now and self._shuffle is None):
                self._start(start)

    def _next_start(self) -> float:
        """When the idle link can begin the next piece of what is queued."""
        return max(self._free_at, min(self._read_until.get(ticket.slot, 0.0) for ticket in self._queue))

    def _start(self, when: float) -> None:
        def may_start(ticket: Ticket) -> bool:
            return self._read_until.get(ticket.slot, 0.0) <= when

        shuffle = self._shuffle
        piece = self._queue.take(may_start) if shuffle is None else self._queue.draw(shuffle, may_start)
        assert piece is not None
        if piece.is_first:
            piece.ticket.start(when)
            self._read_until.pop(piece.ticket.slot, None)
        self.on_link, self._free_at, self._due = piece, when, when + self._seconds(piece.nbytes)

    def _complete(self, piece: CopyPiece) -> None:
        ticket = piece.ticket
        error = self._copy(ticket) if piece.is_last else None
        if error is None and self._on_copied is not None:
            self._on_copied(self._free_at, self._due, piece.nbytes)
        if piece.is_last:
            ticket.finish(self._due, error)
        self.on_link, self._free_at = None, self._due

    def _copy(self, ticket: Ticket) -> CopyError | None:
        if self._store is None or self._pool is None:
            return None
        try:
            self._store.read(ticket.expert, self._pool.row(ticket.slot))
        except Exception as error:
            return ticket.failure(error)
        return None
