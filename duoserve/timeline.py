"""Busy times of two lanes: how long copies ran, and for how much of that the compute lane was busy too.

All times are seconds on one clock.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

Interval = tuple[float, float]

# This many intervals are kept before the older half is folded into sums. A copy that runs while so many others come
# and go loses the part of it that was folded away, so the number is generous.
FOLD_AT = 4096


class Timeline:
    """Busy time of the copy lane and of both lanes at once since ``start``, in bounded memory; for any thread."""

    def __init__(self, start: float) -> None:
        self._lock = threading.Lock()
        self._copies: list[Interval] = []  # as they were added
        self._computes: list[Interval] = []  # disjoint, in order
        self._computing_since: float | None = None
        self._folded_until = start
        self._transfer = 0.0
        self._overlap = 0.0

    def add_copy(self, start: float, stop: float) -> None:
        """A copy ran from ``start`` to ``stop``; copies may overlap and come in any order."""
        with self._lock:
            self._add(self._copies, start, stop)

    def add_stall(self, start: float, stop: float) -> float:
        """The compute lane waited from ``start`` to ``stop``, which is not in the future.

        Gives the seconds of this interval that had been counted as busy and no longer are, so none are given twice.
        Stalls may be added late, and in any order.
        """
        with self._lock:
            since = self._computing_since
            if since is not None and since < stop:
                self._computing_since = stop
                self._add(self._computes, since, stop)
            return self._cut(start, stop)

    def start_compute(self, now: float) -> None:
        """The compute lane is busy from ``now`` on."""
        with self._lock:
            self._computing_since = now

    def stop_compute(self, now: float) -> None:
        """The compute lane is idle from ``now`` on."""
        with self._lock:
            if self._computing_since is not None:
                self._add(self._computes, self._computing_since, now)
            self._computing_since = None

    def totals(self, until: float) -> tuple[float, float]:
        """Seconds before ``until`` in which copies ran, and in which both lanes were busy."""
        with self._lock:
            copies = _clip(_merge(self._copies), float("-inf"), until)
            computing = [] if self._computing_since is None else [(self._computing_since, until)]
            overlap = _seconds_in(_common(copies, self._computes + computing))
            return self._transfer + _seconds_in(copies), self._overlap + overlap

    def _cut(self, start: float, stop: float) -> float:
        """Takes an interval out of the compute lane's busy time; gives the seconds that were taken out."""
        first = bisect_right(self._computes, start, key=lambda busy: busy[1])
        last = bisect_left(self._computes, stop, key=lambda busy: busy[0])
        within = self._computes[first:last]
        self._computes[first:last] = [*_clip(within, float("-inf"), start), *_clip(within, stop, float("inf"))]
        return _seconds_in(_clip(within, start, stop))

    def _add(self, lane: list[Interval], start: float, stop: float) -> None:
        begin = max(start, self._folded_until)
        if begin < stop:
            lane.append((begin, stop))
        if len(lane) >= FOLD_AT:
            self._fold(sorted(stop for _, stop in lane)[FOLD_AT // 2])

    def _fold(self, until: float) -> None:
        """Turns what happened before ``until`` into sums."""
        if self._computing_since is not None and self._computing_since < until:
            self._computes.append((self._computing_since, until))
            self._computing_since = until
        copies = _clip(_merge(self._copies), float("-inf"), until)
        self._transfer += _seconds_in(copies)
        self._overlap += _seconds_in(_common(copies, self._computes))
        self._copies = _clip(self._copies, until, float("inf"))
        self._computes = _clip(self._computes, until, float("inf"))
        self._folded_until = until


def _merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _clip(intervals: Iterable[Interval], start: float, stop: float) -> list[Interval]:
    clipped = ((max(a, start), min(b, stop)) for a, b in intervals)
    return [(a, b) for a, b in clipped if a < b]


def _seconds_in(intervals: Iterable[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def _common(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The intersection of two ordered lists of disjoint intervals, as such a list."""
    common: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            common.append((start, stop))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common
