"""What StreamCopyEngine learns from marks on lanes: what uses a slot, what is queued, and when it was done.

Not thread-safe: the engine holds its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

from duoserve.experts.copy_engine import CopyListener
from duoserve.experts.streams import Lane, Mark, Streams
from duoserve.experts.tickets import Ticket

# No more of the prefetches stands on their lane than one piece, for a demand may have to wait for all of it: CUDA does
# not order copies by priority. A piece goes in this many parts: one is copied while the next waits behind it, so that
# the link never idles.
PARTS_OF_A_PIECE = 2
# Times are counted from a moment that is not longer ago than this, if the lanes have been idle since. The clocks of a
# host and of a device part by tens of microseconds a second, and CUDA counts in float32: after an hour, in quarters of
# a millisecond. It takes some 10 us to find such a moment.
RENEW_S = 0.1

StallListener = Callable[[float, float], None]  # called with when the compute lane began and ceased to wait for a copy


class SlotUsers:
    """For each slot, the marks until which it is used: by kernels, and by copies whose tickets have finished."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._readers: dict[int, Mark] = {}  # by slot
        self._landing: dict[int, Mark] = {}  # by slot

    def read(self, slots: Collection[int], until: Mark) -> None:
        """Kernels before ``until`` may read these slots."""
        self._readers.update(dict.fromkeys(slots, until))

    def is_read(self, slot: int) -> bool:
        """Whether a kernel may still read the slot."""
        until = self._readers.get(slot)
        return until is not None and not self._streams.passed(until)

    def land(self, slot: int, until: Mark) -> None:
        """Bytes of a copy into the slot land before ``until``, although its ticket has finished."""
        self._landing[slot] = until

    def landing(self) -> list[Mark]:
        """The marks before which such copies land."""
        return [*self._landing.values()]

    def precede(self, lane: Lane, slot: int) -> None:
        """What is enqueued on ``lane`` from now on comes behind all that uses the slot, and is the next to use it."""
        for users in (self._readers, self._landing):
            if slot in users:
                self._streams.after(lane, users[slot])
                del users[slot]  # last: if an interrupt keeps the lane from waiting, the slot's next copy waits

    def precede_compute(self) -> None:
        """What is enqueued on COMPUTE from now on starts after all such copies have landed."""
        for slot, until in [*self._landing.items()]:
            if self._streams.passed(until):
                del self._landing[slot]
            else:
                self._streams.after(Lane.COMPUTE, until)


class _Part(NamedTuple):
    """A part of a prefetch on its lane: ``nbytes`` bytes, copied once ``end`` has passed."""

    end: Mark
    nbytes: int


class PrefetchLane:
    """Room on the lane of prefetches: at most ``piece_bytes`` stand there, in parts of ``part_bytes``."""

    def __init__(self, streams: Streams, piece_bytes: int) -> None:
        self._streams = streams
        self._piece_bytes = piece_bytes
        self._standing: deque[_Part] = deque()
        self.part_bytes = max(1, piece_bytes // PARTS_OF_A_PIECE)

    def add(self, end: Mark, nbytes: int) -> None:
        """``nbytes`` have been enqueued, up to ``end``."""
        self._standing.append(_Part(end, nbytes))

    def in_the_way(self, nbytes: int) -> Mark | None:
        """The mark that must pass before ``nbytes`` more may stand there; None if they may now."""
        standing = self._standing
        while standing and self._streams.passed(standing[0].end):
            standing.popleft()
        too_much = sum(one.nbytes for one in standing) + nbytes > self._piece_bytes
        return standing[0].end if standing and too_much else None


class _Stretch(NamedTuple):
    """What lies between two marks."""

    begin: Mark
    end: Mark


class _Copied(NamedTuple):
    """A copy: what lies between the marks and, if its row was ``read`` first, the time before them."""

    ticket: Ticket
    stretch: _Stretch
    read: bool


class LaneTimes:
    """Reports when copies of ``nbytes`` and stalls happened, once the device has passed their marks.

    Times count from a mark on DEMAND; making this object waits for the device to reach it, and so does ``report``
    whenever it makes another.
    """

    def __init__(
        self,
        streams: Streams,
        now: Callable[[], float],
        nbytes: int,
        on_copied: CopyListener | None,
        on_stalled: StallListener | None,
    ) -> None:
        self._streams = streams
        self._now = now
        self._nbytes = nbytes
        self._on_copied = on_copied
        self._on_stalled = on_stalled
        self._copies: deque[_Copied] = deque()
        self._stalls: deque[_Stretch] = deque()
        self._count_from_now()

    def copied(self, ticket: Ticket, begin: Mark, end: Mark, read: bool) -> None:
        """The copy of ``ticket`` lies between these marks; ``read``: its row was read from the disk before them."""
        self._copies.append(_Copied(ticket, _Stretch(begin, end), read))

    def stalled(self, begin: Mark, end: Mark) -> None:
        """Between these marks COMPUTE does nothing but wait for a copy."""
        self._stalls.append(_Stretch(begin, end))

    def ends(self) -> list[Mark]:
        """The ends of the copies that have not been reported."""
        return [copy.stretch.end for copy in self._copies]

    def report(self, copying: bool) -> None:
        """Reports what has passed. ``copying``: copies are under way for which ``copied`` has not been called."""
        while self._stalls and self._streams.passed(self._stalls[0].end):
            stall = self._stalls.popleft()
            if self._on_stalled is not None:
                self._on_stalled(*self._seconds_at(stall))
        while self._copies and self._streams.passed(self._copies[0].stretch.end):
            copy = self._copies.popleft()
            begin_s, end_s = self._seconds_at(copy.stretch)
            taken_s = copy.ticket.started_at if copy.read else None
            copy.ticket.arrive(begin_s if taken_s is None else taken_s, end_s)
            if self._on_copied is not None:
                self._on_copied(begin_s, end_s, self._nbytes)
        # While copies never cease, DEMAND may not be idle, and there is no better origin.
        if not (copying or self._copies or self._stalls) and self._now() - self._origin_s > RENEW_S:
            self._count_from_now()

    def _count_from_now(self) -> None:
        self._origin = self._streams.mark(Lane.DEMAND)
        self._streams.wait(self._origin)
        self._origin_s = self._now()

    def _seconds_at(self, stretch: _Stretch) -> tuple[float, float]:
        """When its marks were passed, on the clock of ``now``."""
        begin_s = self._origin_s + self._streams.seconds(self._origin, stretch.begin)
        return begin_s, begin_s + self._streams.seconds(*stretch)
