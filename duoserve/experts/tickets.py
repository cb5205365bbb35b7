"""A copy that was asked for (Ticket), and the order in which the pieces of such copies are served (TicketQueue)."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from itertools import chain
from typing import NamedTuple

from duoserve.errors import CopyError
from duoserve.experts.layout import ExpertId

# The size of a prefetch's pieces: a demand may have to wait for one, 0.3 ms at 25 GB/s. Putting one on the link costs
# some microseconds.
PIECE_BYTES = 8 << 20


class Priority(IntEnum):
    """Which copies go first: what the computation waits for goes before what it may want."""

    DEMAND = 0
    PREFETCH = 1


class TicketState(Enum):
    """QUEUED -> RUNNING (from its first piece on) -> DONE or FAILED; CANCELLED before its last piece is taken."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False, slots=True)
class Ticket:
    """One copy of an expert into a slot. Only the engine that issued it changes it.

    Times are seconds on that engine's clock. ``priority`` becomes DEMAND when a prefetch is promoted; ``error`` is set
    when ``state`` is FAILED. ``sent`` of the ``nbytes`` are in pieces that were taken: these have arrived, or will. The
    bytes in the slot are undefined until the ticket is DONE.

    The copy was made from ``started_at`` to ``arrived_at``. Where a device makes it behind the host, the ticket is DONE
    before that: ``arrived_at`` is None, and ``started_at`` is when the host began, until the device has said both.
    """

    expert: ExpertId
    slot: int
    priority: Priority
    nbytes: int
    issued_at: float
    state: TicketState = TicketState.QUEUED
    started_at: float | None = None
    finished_at: float | None = None
    arrived_at: float | None = None
    error: CopyError | None = None
    sent: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more: DONE, FAILED or CANCELLED."""
        return self.finished_at is not None

    def start(self, now: float) -> None:
        """The copy has begun."""
        self.started_at = now
        self.state = TicketState.RUNNING

    def finish(self, now: float, error: CopyError | None = None) -> None:
        """The copy has ended, well unless there is an ``error``."""
        self.error = error
        self.state = TicketState.DONE if error is None else TicketState.FAILED
        self.arrived_at = now if error is None else None
        self.finished_at = now  # last: other threads may ask whether it is ``finished``

    def hand_over(self, now: float) -> None:
        """The copy is DONE for all work that the device is given from now on; ``arrive`` will say when it was made."""
        self.state = TicketState.DONE
        self.finished_at = now

    def arrive(self, started_at: float, arrived_at: float) -> None:
        """The device has made the copy in this time."""
        self.started_at, self.arrived_at = started_at, arrived_at

    def cancel(self, now: float) -> None:
        """The copy will not be made, or not to its end."""
        self.state = TicketState.CANCELLED
        self.finished_at = now

    def failure(self, cause: BaseException) -> CopyError:
        """``cause`` itself if it is a CopyError, else a CopyError that names the expert and has it as its cause."""
        if isinstance(cause, CopyError):
            return cause
        error = CopyError(f"{self.expert} could not be copied into slot {self.slot}: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error


class CopyPiece(NamedTuple):
    """Bytes ``start`` to ``stop`` of a ticket's copy."""

    ticket: Ticket
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.stop - self.start

    @property
    def is_first(self) -> bool:
        """Whether the copy begins with it."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the copy is complete once it has arrived, and those before it."""
        return self.stop == self.ticket.nbytes


def always(ticket: Ticket) -> bool:
    """Any ticket may start."""
    return True


class TicketQueue:
    """Tickets of which a piece is left: demands before prefetches, first come first served within each.

    All that is left of a demand is one piece; a prefetch goes in pieces of ``piece_bytes`` (None: whole) and keeps its
    place until its last one is taken, so that between two of them demands overtake it, and it can be promoted or
    cancelled. Not thread-safe. ValueError for pieces of no bytes.
    """

    def __init__(self, piece_bytes: int | None = None) -> None:
        if piece_bytes is not None and piece_bytes < 1:
            raise ValueError(f"pieces of {piece_bytes} bytes would never come to an end")
        self._piece_bytes = piece_bytes
        # Ordered dicts, for a ticket leaves from the middle when it is cancelled or promoted, in O(1).
        self._lanes: list[OrderedDict[Ticket, None]] = [OrderedDict() for _ in Priority]

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes)

    def __bool__(self) -> bool:
        return any(self._lanes)  # asked for every event of a replay, for which counting is slow

    def __iter__(self) -> Iterator[Ticket]:
        """The tickets in the order in which it is their turn."""
        return chain.from_iterable(self._lanes)

    def push(self, ticket: Ticket) -> None:
        """Puts the ticket behind all others of its priority."""
        self._lanes[ticket.priority][ticket] = None

    def take(self, may_start: Callable[[Ticket], bool] = always) -> CopyPiece | None:
        """The next piece of the ticket whose turn it is among those that may start; None when there is none."""
        ticket = next(filter(may_start, self), None)
        return None if ticket is None else self._cut(ticket)

    def draw(self, rng: random.Random, may_start: Callable[[Ticket], bool] = always) -> CopyPiece | None:
        """The next piece of any ticket that may start, whatever its priority; None when there is none."""
        tickets = list(filter(may_start, self))
        return self._cut(rng.choice(tickets)) if tickets else None

    def discard(self, ticket: Ticket) -> bool:
        """Takes this ticket out; False when no piece of it was left here."""
        lane = self._lanes[ticket.priority]
        if ticket not in lane:
            return False
        del lane[ticket]
        return True

    def withdraw(self, ticket: Ticket) -> bool:
        """Takes this ticket out as ``discard`` does; True also for a ticket that is QUEUED and was never put in."""
        return self.discard(ticket) or ticket.state is TicketState.QUEUED

    def clear(self) -> list[Ticket]:
        """Takes out all tickets and returns them in the order of their turns."""
        tickets = list(self)
        for lane in self._lanes:
            lane.clear()
        return tickets

    def promote(self, ticket: Ticket) -> None:
        """Makes a prefetch of which a piece is left the last of the demands; does nothing for any other ticket."""
        if ticket.priority is Priority.PREFETCH and self.discard(ticket):
            ticket.priority = Priority.DEMAND
            self.push(ticket)

    def _cut(self, ticket: Ticket) -> CopyPiece:
        start, ticket.sent = ticket.sent, ticket.nbytes
        if ticket.priority is Priority.PREFETCH and self._piece_bytes is not None:
            ticket.sent = min(ticket.nbytes, start + self._piece_bytes)
        if ticket.sent == ticket.nbytes:
            self.discard(ticket)
        return CopyPiece(ticket, start, ticket.sent)
