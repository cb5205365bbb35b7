"""What a prefetch may cost: the time in which the link would be idle, and how often guesses have come true.

All times are seconds on the copy engine's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from duoserve.experts.tickets import Priority, Ticket
from duoserve.scheduling.account import Account

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


class Demand(NamedTuple):
    """What a layer asks for: ``copies`` of the experts ``wanted`` are neither in slots nor on their way.

    Without guesses it would be ``unguessed``. The layer is ``alone`` with the link if no guess is under way.
    """

    wanted: int
    copies: int
    unguessed: int
    alone: bool


class Link(Protocol):
    """What guesses are weighed by."""

    @property
    def copy_s(self) -> float | None:
        """How long a copy takes; None until one has been made on demand."""

    @property
    def account(self) -> Account:
        """What guesses have saved and cost."""

    def use_chance(self, num_slots: int) -> float:
        """The chance that a layer with ``num_slots`` of them uses the expert in any one in its next step."""

    def idle_before(self, layer: int) -> float:
        """How long the link will have been idle, demands apart, when ``layer``, the next one, is routed."""


class IdleLink:
    """How long the link has nothing to do for demands before each layer is routed, and how long a copy takes.

    The idle time is counted apart for what comes after a layer that had to wait: its end is the arrival of the last.
    ``account`` is kept of how long layers would have waited without guesses.
    """

    def __init__(self, num_layers: int, most_open: int) -> None:
        self.copy_s: float | None = None
        self.account = Account(most_open)
        self._miss_s: float | None = None  # how long a miss makes its layer wait: no full copy where two run at once
        self._idle_s: list[list[float | None]] = [[None, None] for _ in range(num_layers)]
        self._routed_at: float | None = None
        self._since = 0.0  # when the last copy that is waited for arrived
        self._demand = Demand(0, 0, 0, True)
        self._hits: float | None = None  # of a layer

    def pause(self) -> None:
        """What comes until the next layer is routed is not measured."""
        self._routed_at = None

    def arrived(self, ticket: Ticket, asked: bool) -> None:
        """A copy has been made, of an expert that was ``asked`` for before, or is a guess still."""
        assert ticket.started_at is not None and ticket.finished_at is not None
        if ticket.priority is Priority.DEMAND:
            self.copy_s = _follow(self.copy_s, ticket.finished_at - ticket.started_at)
        if asked:
            self._since = max(self._since, ticket.finished_at)

    def routed(self, layer: int, now: float) -> None:
        """``layer`` asks for its experts ``now``, and all demands of the layers before it have arrived."""
        if self._routed_at is not None:
            self._settle(layer, now - self._routed_at, self._since - self._routed_at)
            here, waited = self._idle_s[layer], self._since > self._routed_at
            here[waited] = _follow(here[waited], max(0.0, now - self._since))
        self._routed_at = self._since = now

    def demanded(self, demand: Demand) -> None:
        """What the layer that was routed last wants."""
        self._demand = demand
        self._hits = _follow(self._hits, demand.wanted - demand.copies)

    def _settle(self, layer: int, seconds: float, waited_s: float) -> None:
        """Accounts for the layer before ``layer``, of which the computing covers some waiting, guesses or not."""
        demand = self._demand
        if demand.alone and demand.copies:
            self._miss_s = _follow(self._miss_s, waited_s / demand.copies)
        if self._miss_s is not None and self.copy_s is not None:
            after_hits, after_misses = self._idle_s[layer]
            covered_s = 0.0 if after_hits is None or after_misses is None else max(0.0, after_hits - after_misses)
            unguessed_s = max(0.0, demand.unguessed * self._miss_s - covered_s)
            self.account.settle(seconds, unguessed_s - max(0.0, waited_s - covered_s), self.copy_s)

    def use_chance(self, num_slots: int) -> float:
        """As in Link."""
        return _use_chance(self._hits, num_slots)

    def idle_before(self, layer: int) -> float:
        """As in Link."""
        measured = self._idle_s[layer]
        after_misses = self._demand.copies > 0
        seconds = measured[after_misses]
        return (measured[not after_misses] if seconds is None else seconds) or 0.0


class StepLink:
    """The same for steps that the device carries out by itself, which keep the link to their own misses.

    It is idle for guesses from the end of such a step until the next is launched, and a copy that is not made by then
    is of no use. How long a copy takes is known from ``link``, whose account is gone on with.
    """

    def __init__(self, link: IdleLink) -> None:
        self._link = link
        self._gap_s: float | None = None
        self._hits: float | None = None  # of a layer
        self._ended_at: float | None = None  # the last step
        self._asked_at: float | None = None  # for the guesses that are open since
        self._ready_at = 0.0  # when they will have been copied
        self._risked_s = 0.0  # and not accounted for yet

    @property
    def copy_s(self) -> float | None:
        """As in Link."""
        return self._link.copy_s

    @property
    def account(self) -> Account:
        """As in Link."""
        return self._link.account

    def pause(self) -> None:
        """What comes until the next step has ended is not measured."""
        self._ended_at = self._asked_at = None

    def stepped(self, now: float, hits: float, came_true: int) -> None:
        """A step has ended, whose layers hit so many experts in the mean; so many guesses are among them."""
        self._hits = _follow(self._hits, hits)
        if self._ended_at is not None and self.copy_s is not None:
            self.account.settle(now - self._ended_at, came_true * self.copy_s - self._risked_s, self.copy_s)
            self._risked_s = 0.0
        self._ended_at = now

    def asked(self, now: float, num_slots: Sequence[int]) -> None:
        """Guesses are copied from ``now`` on, one for each layer that has so many slots."""
        self._asked_at = self._ready_at = now
        if self.copy_s is not None:
            self._ready_at += len(num_slots) * self.copy_s
            self._risked_s += self.copy_s * sum(map(self.use_chance, num_slots))

    def launched(self, now: float) -> None:
        """The next step is launched, behind what is on its way."""
        if self._asked_at is not None:
            self._gap_s = _follow(self._gap_s, now - self._asked_at)
            self._risked_s += max(0.0, self._ready_at - now)
        self._asked_at = None

    def use_chance(self, num_slots: int) -> float:
        """As in Link."""
        return _use_chance(self._hits, num_slots)

    def idle_before(self, layer: int) -> float:
        """How long the link will be idle before the next step, in whole copies: a part of one is of no use."""
        copy_s = self.copy_s
        return 0.0 if not copy_s else copy_s * int((self._gap_s or 0.0) / copy_s)


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


def _use_chance(hits: float | None, num_slots: int) -> float:
    """Of a layer that hits so many of its experts in the mean; None where that is not known yet."""
    return min(1.0, (hits or 0.0) / max(1, num_slots))


def _follow(mean: float | None, measured: float) -> float:
    return measured if mean is None else mean + FOLLOW * (measured - mean)
