"""Copies on the lanes of a device, from where the first byte is enqueued to the kernels that may read the slot.

Not thread-safe: the engine holds its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from duoserve.experts.copy_engine import CopyListener
from duoserve.experts.lane_marks import LaneTimes, PrefetchLane, SlotUsers, StallListener
from duoserve.experts.slots import SlotPool
from duoserve.experts.streams import Lane, Mark, Streams
from duoserve.experts.tickets import Priority, Ticket


@dataclass(slots=True)
class LaneCopy:
    """A copy on ``lane``: what has been enqueued of it lies between the marks ``begin`` and ``end``.

    ``read``: its row has been read from the disk for it.
    """

    lane: Lane
    begin: Mark
    end: Mark
    read: bool


class LaneCopies:
    """Enqueues copies into ``pool``, at most ``piece_bytes`` of prefetches at a time, and knows how far each has come.

    A copy into a slot starts after the kernels before its ``fence``. The clock ``now`` is that of the tickets. The
    listeners are told of copies that have been made and of stalls.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        pool: SlotPool,
        streams: Streams,
        now: Callable[[], float],
        piece_bytes: int,
        on_copied: CopyListener | None,
        on_stalled: StallListener | None,
    ) -> None:
        self._pool = pool
        self._streams = streams
        self._now = now
        self._copying: dict[Ticket, LaneCopy] = {}  # of which something has not been enqueued yet
        self._arrivals: dict[Ticket, LaneCopy] = {}  # enqueued and not DONE, in the order of enqueueing
        self._users = SlotUsers(streams)
        self._prefetches = PrefetchLane(streams, piece_bytes)
        streams.after(Lane.DEMAND, streams.mark(Lane.COMPUTE))  # no copy comes before the pool's first bytes
        self._times = LaneTimes(streams, now, pool.rows_SB.shape[1], on_copied, on_stalled)

    def begin(self, ticket: Ticket, read: bool) -> LaneCopy:
        """Begins a copy, which comes behind all that uses the slot; nothing of it has been enqueued yet."""
        lane = _lane(ticket)
        self._users.precede(lane, ticket.slot)
        begin = self._streams.mark(lane)
        copy = self._copying[ticket] = LaneCopy(lane, begin, begin, read)
        return copy

    def enqueue(self, ticket: Ticket, copy: LaneCopy, row_B: Tensor) -> Mark | None:
        """Enqueues what is left of a demand or a part of a prefetch; else returns what must pass before it has room."""
        lane, start, stop = _lane(ticket), ticket.sent, ticket.nbytes
        if lane is Lane.PREFETCH:
            stop = min(start + self._prefetches.part_bytes, stop)
            if (in_the_way := self._prefetches.in_the_way(stop - start)) is not None:
                return in_the_way
        if lane is not copy.lane:  # it has been promoted meanwhile
            self._streams.after(lane, copy.end)
            copy.lane = lane
        self._streams.copy(lane, self._pool.row(ticket.slot)[start:stop], row_B[start:stop])
        copy.end, ticket.sent = self._streams.mark(lane), stop
        if lane is Lane.PREFETCH:
            self._prefetches.add(copy.end, stop - start)
        if stop == ticket.nbytes:
            del self._copying[ticket]
            self._arrivals[ticket] = copy
        return None

    def arrives(self, ticket: Ticket) -> bool:
        """Whether all of the copy has been enqueued, and it is not DONE."""
        return ticket in self._arrivals

    def drop(self, ticket: Ticket) -> None:
        """Nothing more will be enqueued of the copy."""
        self._copying.pop(ticket, None)

    def stop(self, ticket: Ticket) -> bool:
        """Stops enqueueing a prefetch. False for a demand, and for what has not begun or is all enqueued."""
        if ticket.priority is Priority.DEMAND or ticket not in self._copying:
            return False
        self._users.land(ticket.slot, self._copying[ticket].end)
        del self._copying[ticket]
        return True

    def first_of(self, tickets: Collection[Ticket]) -> Ticket | None:
        """The ticket whose copy was enqueued first; None if none of them has been."""
        return next((ticket for ticket in self._arrivals if ticket in tickets), None)

    def join(self, ticket: Ticket) -> None:
        """Makes the compute lane wait for a copy that ``arrives``, and notes how long it waits."""
        before, end = self._streams.mark(Lane.COMPUTE), self._arrivals[ticket].end
        self._streams.after(Lane.COMPUTE, end)
        self._times.stalled(before, self._streams.mark(Lane.COMPUTE))
        self._users.land(ticket.slot, end)  # DONE, but a slot that nobody reads has no fence
        self._finish(ticket)

    def reap(self) -> None:
        """Tickets whose copies have been made are DONE, and what was measured is reported."""
        held_up: Lane | None = None  # of the copies on one lane the first arrives first
        for ticket, copy in [*self._arrivals.items()]:
            if copy.lane is not held_up:
                if self._streams.passed(copy.end):
                    self._finish(ticket)
                else:
                    held_up = copy.lane
        self._times.report(copying=bool(self._copying or self._arrivals))

    def may_start(self, ticket: Ticket) -> bool:
        """Whether the copy would not hold up others on its lane: it is a demand, or no kernel reads the slot."""
        return ticket.priority is Priority.DEMAND or not self._users.is_read(ticket.slot)

    def fence(self, slots: Collection[int], until: Mark) -> None:
        """Kernels before ``until`` may read these slots."""
        self._users.read(slots, until)

    def land(self) -> None:
        """What is enqueued on COMPUTE from now on starts after all parts of cancelled copies have landed."""
        self._users.precede_compute()

    def ends(self) -> list[Mark]:
        """The marks behind all that has been enqueued."""
        return [*(copy.end for copy in self._arrivals.values()), *self._times.ends(), *self._users.landing()]

    def _finish(self, ticket: Ticket) -> None:
        copy = self._arrivals[ticket]
        self._times.copied(ticket, copy.begin, copy.end, copy.read)
        ticket.hand_over(self._now())
        del self._arrivals[ticket]  # last: an interrupt must not leave a ticket that is nowhere and never finishes


def _lane(ticket: Ticket) -> Lane:
    return Lane.DEMAND if ticket.priority is Priority.DEMAND else Lane.PREFETCH
