"""A copy that was asked for (Ticket), and the order in which such copies are served (TicketQueue)."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, IntEnum

from duoserve.errors import CopyError
from duoserve.experts.layout import ExpertId


class Priority(IntEnum):
    """Which copies go first: what the computation waits for goes before what it may want."""

    DEMAND = 0
    PREFETCH = 1


class TicketState(Enum):
    """QUEUED -> RUNNING -> DONE or FAILED; QUEUED -> CANCELLED."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


_FINISHED = frozenset({TicketState.DONE, TicketState.FAILED, TicketState.CANCELLED})


@dataclass(eq=False, slots=True)
class Ticket:
    """One copy of an expert into a slot. Only the engine that issued it changes it.

    Times are seconds on that engine's clock. ``priority`` becomes DEMAND when a prefetch is promoted; ``error`` is set
    when ``state`` is FAILED, and the bytes in the slot are then undefined.
    """

    expert: ExpertId
    slot: int
    priority: Priority
    nbytes: int
    issued_at: float
    state: TicketState = TicketState.QUEUED
    started_at: float | None = None
    finished_at: float | None = None
    error: CopyError | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more: DONE, FAILED or CANCELLED."""
        return self.state in _FINISHED

    def start(self, now: float) -> None:
        """The copy has begun."""
        self.started_at = now
        self.state = TicketState.RUNNING

    def finish(self, now: float, error: CopyError | None = None) -> None:
        """The copy has ended, well unless there is an ``error``."""
        self.finished_at = now
        self.error = error
        self.state = TicketState.DONE if error is None else TicketState.FAILED

    def cancel(self, now: float) -> None:
        """The copy will not be made."""
        self.finished_at = now
        self.state = TicketState.CANCELLED

    def failure(self, cause: BaseException) -> CopyError:
        """``cause`` itself if it is a CopyError, else a CopyError that names the expert and has it as its cause."""
        if isinstance(cause, CopyError):
            return cause
        error = CopyError(
            f"expert {self.expert.layer}/{self.expert.expert} could not be copied into slot {self.slot}: "
            f"{type(cause).__name__}: {cause}"
        )
        error.__cause__ = cause
        return error


class TicketQueue:
    """Queued tickets: demands before prefetches, first come first served within each. Not thread-safe."""

    def __init__(self) -> None:
        # Ordered dicts, for a ticket leaves from the middle when it is cancelled or promoted, in O(1).
        self._lanes: list[OrderedDict[Ticket, None]] = [OrderedDict() for _ in Priority]

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes)

    def push(self, ticket: Ticket) -> None:
        """Puts the ticket behind all others of its priority."""
        self._lanes[ticket.priority][ticket] = None

    def pop(self) -> Ticket | None:
        """Takes the ticket whose turn it is; None when there is none."""
        for lane in self._lanes:
            if lane:
                return lane.popitem(last=False)[0]
        return None

    def draw(self, rng: random.Random) -> Ticket | None:
        """Takes any ticket, whatever its priority; None when there is none."""
        tickets = [ticket for lane in self._lanes for ticket in lane]
        if not tickets:
            return None
        ticket = rng.choice(tickets)
        self.discard(ticket)
        return ticket

    def discard(self, ticket: Ticket) -> bool:
        """Takes this ticket out; False when it was not queued here."""
        lane = self._lanes[ticket.priority]
        if ticket not in lane:
            return False
        del lane[ticket]
        return True

    def promote(self, ticket: Ticket) -> None:
        """Makes a queued prefetch the last of the demands; does nothing for any other ticket."""
        if ticket.priority is Priority.PREFETCH and self.discard(ticket):
            ticket.priority = Priority.DEMAND
            self.push(ticket)
