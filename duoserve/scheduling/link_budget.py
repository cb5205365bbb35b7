"""What a prefetch may cost: the time in which the link would be idle, and how often guesses have come true.

All times are seconds on the copy engine's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from duoserve.experts.tickets import Priority, Ticket

# How fast the measurements follow: a new one counts for so much of the mean.
FOLLOW = 0.1
# A guess must come true at least so often, even where the link is idle: it costs energy, and its slot has a victim.
MIN_CHANCE = 0.25
_BINS = 10
_PRIOR = 4.0  # guesses' worth of trust in what the predictor says about itself
_KEEP = 0.99  # of the record of a bin, for each new guess in it


class Guess(NamedTuple):
    """An absent expert of a coming layer, and the chance that it will be wanted there."""

    expert: int
    chance: float


class Calibration:
    """How often guesses of each stated chance came true of late, which is the chance that they are given.

    The record is of what was predicted, copied or not, so that a predictor that was no use is heard again when it is.
    """

    def __init__(self) -> None:
        self._said = [_PRIOR * (bin_ + 0.5) / _BINS for bin_ in range(_BINS)]
        self._counts = [_PRIOR] * _BINS

    def chance(self, stated: float) -> float:
        """What a guess with the chance ``stated`` by its predictor is worth."""
        bin_ = min(_BINS - 1, int(stated * _BINS))
        return self._said[bin_] / self._counts[bin_]

    def note(self, stated: float, came_true: bool) -> None:
        """A guess has been settled."""
        bin_ = min(_BINS - 1, int(stated * _BINS))
        self._said[bin_] = _KEEP * self._said[bin_] + came_true
        self._counts[bin_] = _KEEP * self._counts[bin_] + 1


class IdleLink:
    """How long the link has nothing to do for demands before each layer is routed, and how long a copy takes.

    The idle time is counted apart for what comes after a layer that had misses: its end is the arrival of the last.
    """

    def __init__(self, num_layers: int) -> None:
        self.copy_s: float | None = None
        self._idle_s: list[list[float | None]] = [[None, None] for _ in range(num_layers)]
        self._since: float | None = None
        self._after_misses = False
        self._hits: float | None = None  # of a layer

    def pause(self) -> None:
        """What comes until the next layer is routed is not measured."""
        self._since = None

    def arrived(self, ticket: Ticket) -> None:
        """A copy has been made."""
        if ticket.priority is Priority.DEMAND and ticket.started_at is not None and ticket.finished_at is not None:
            self.copy_s = _follow(self.copy_s, ticket.finished_at - ticket.started_at)
            if self._since is not None:
                self._since = max(self._since, ticket.finished_at)

    def routed(self, layer: int, now: float) -> None:
        """``layer`` asks for its experts ``now``, and all demands of the layers before it have arrived."""
        if self._since is not None:
            here = self._idle_s[layer]
            here[self._after_misses] = _follow(here[self._after_misses], max(0.0, now - self._since))
        self._since = now

    def demanded(self, num_wanted: int, num_copies: int) -> None:
        """The layer that was routed last wants so many experts, and so many of them have to be copied."""
        self._after_misses = num_copies > 0
        self._hits = _follow(self._hits, num_wanted - num_copies)

    def use_chance(self, num_slots: int) -> float:
        """The chance that a layer with ``num_slots`` of them uses the expert in any one in its next step."""
        return min(1.0, (self._hits or 0.0) / max(1, num_slots))

    def idle_before(self, layer: int) -> float:
        """How long the link will have been idle, demands apart, when ``layer``, the next one, is routed."""
        measured = self._idle_s[layer]
        seconds = measured[self._after_misses]
        return (measured[not self._after_misses] if seconds is None else seconds) or 0.0


def affordable(
    guesses: Iterable[tuple[int, Guess]],
    idle_s: float,
    copy_s: float,
    queued: int,
    victim_chances: Sequence[float],
) -> list[tuple[int, Guess]]:
    """The ``guesses`` that pay, each with how many layers ahead (from 0) it is, when ``queued`` copies go before them.

    The link is idle for ``idle_s`` until the next layer is routed; the share of a copy that is left then delays that
    layer's demands, whatever layer it is for. A guess that is right saves the rest of it. One that is wrong gives up an
    expert that would have been used with one of ``victim_chances``, which are by layers ahead.
    """
    free_at, chosen = queued * copy_s, []
    for ahead, guess in guesses:
        share_left = max(0.0, (free_at + copy_s - idle_s) / copy_s)
        victim = victim_chances[ahead]
        if share_left < 1 and guess.chance >= max(MIN_CHANCE, (share_left + victim) / (1 + victim)):
            chosen.append((ahead, guess))
            free_at += copy_s
    return chosen


def _follow(mean: float | None, measured: float) -> float:
    return measured if mean is None else mean + FOLLOW * (measured - mean)
