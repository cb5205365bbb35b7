"""Which guesses are worth a prefetch, by how long the link would be idle and how often guesses have come true.

A guess costs nothing while the link is idle; beyond that it delays the copies that layers wait for. All times are
seconds on the copy engine's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from duoserve.experts.tickets import Priority, Ticket
from duoserve.scheduling.account import Account

# The share of a new measurement in the running mean.
NEW_SHARE = 0.1
# The least chance of a guess that is copied, even where the link is idle: it costs energy, and its slot has a victim.
MIN_CHANCE = 0.25
_BINS = 10
_PRIOR = 4.0  # the stated chance counts as much as the outcomes of this many guesses
_KEEP = 0.99  # of the record of a bin, for each new guess in it


class Guess(NamedTuple):
    """An absent expert of a coming layer, and the chance that it will be wanted there."""

    expert: int
    chance: float


class Calibration:
    """Corrects the chances that a predictor states by how often such guesses have come true of late.

    All predictions count, whether they were copied or not: a predictor that was wrong for a while, and got no copies,
    can earn them back.
    """

    def __init__(self) -> None:
        self._said = [_PRIOR * (bin_ + 0.5) / _BINS for bin_ in range(_BINS)]
        self._counts = [_PRIOR] * _BINS

    def chance(self, stated: float) -> float:
        """The corrected chance of a guess whose predictor has ``stated`` this one."""
        bin_ = min(_BINS - 1, int(stated * _BINS))
        return self._said[bin_] / self._counts[bin_]

    def note(self, stated: float, came_true: bool) -> None:
        """Notes whether a guess, made with the chance ``stated``, came true."""
        bin_ = min(_BINS - 1, int(stated * _BINS))
        self._said[bin_] = _KEEP * self._said[bin_] + came_true
        self._counts[bin_] = _KEEP * self._counts[bin_] + 1


class Demand(NamedTuple):
    """What one layer of a decode step asked for, as counts of experts.

    ``wanted`` experts were routed to, and ``copies`` of them had to be copied: they were neither in slots nor on their
    way. ``unguessed`` would have had to be copied if no guesses had ever been made. ``alone``: no guess is under way,
    so the copies have the link to themselves.
    """

    wanted: int
    copies: int
    unguessed: int
    alone: bool


class Link(Protocol):
    """What is known of the link when guesses are weighed."""

    @property
    def copy_s(self) -> float | None:
        """How long a copy takes; None until one has been made on demand."""

    @property
    def account(self) -> Account:
        """What guesses have saved and cost so far."""

    def use_chance(self, num_slots: int) -> float:
        """The chance that a layer which has ``num_slots`` slots uses the expert in one of them in its next step."""

    def idle_before(self, layer: int) -> float:
        """For how long no demanded copy will use the link, from now until ``layer``, the next one, is routed."""


class IdleLink:
    """Measures decode steps: for how long no layer waits for the link, and how long a demanded copy takes.

    Before each layer, the link is idle (for demands) from when the layer before it has all its experts until this one
    is routed. There are two means for each layer: one after layers that found all experts in slots, and one after
    layers that had to wait, whose idle time begins when the last copy arrives. ``account`` keeps what guesses have
    saved or cost, by how long each layer would have waited without them.
    """

    def __init__(self, num_layers: int, most_open: int) -> None:
        self.copy_s: float | None = None
        self.account = Account(most_open)
        self._miss_s: float | None = None  # that a layer waits for each miss: less than copy_s if two run at once
        self._idle_s: list[list[float | None]] = [[None, None] for _ in range(num_layers)]
        self._routed_at: float | None = None
        self._since = 0.0  # when the last copy that is waited for arrived
        self._demand = Demand(0, 0, 0, True)
        self._hits: float | None = None  # of a layer

    def pause(self) -> None:
        """Another pass comes before the next layer is routed: the time until then is not measured."""
        self._routed_at = None

    def arrived(self, ticket: Ticket, asked: bool) -> None:
        """A copy has arrived. ``asked``: a layer has asked for its expert; else it still is a guess."""
        assert ticket.started_at is not None and ticket.arrived_at is not None
        if ticket.priority is Priority.DEMAND:
            self.copy_s = _follow(self.copy_s, ticket.arrived_at - ticket.started_at)
        if asked:
            self._since = max(self._since, ticket.arrived_at)

    def routed(self, layer: int, now: float) -> None:
        """``layer`` asks for its experts ``now``, and all demands of the layers before it have arrived."""
        if self._routed_at is not None:
            self._settle(layer, now - self._routed_at, self._since - self._routed_at)
            here, waited = self._idle_s[layer], self._since > self._routed_at
            here[waited] = _follow(here[waited], max(0.0, now - self._since))
        self._routed_at = self._since = now

    def demanded(self, demand: Demand) -> None:
        """Takes the demand of the layer that was routed last."""
        self._demand = demand
        self._hits = _follow(self._hits, demand.wanted - demand.copies)

    def _settle(self, layer: int, seconds: float, waited_s: float) -> None:
        """Accounts for the layer before ``layer``, which took ``seconds`` in all and waited ``waited_s`` for copies.

        Computing its resident experts covers some of the waiting, with guesses and without: that part costs no time.
        """
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
    """The link for steps that the device carries out by itself: while one runs, only its own misses are copied.

    Guesses have the link from the end of such a step until the next is launched. A copy that has not arrived by then is
    of no use. ``link`` knows how long a copy takes, and its account goes on.
    """

    def __init__(self, link: IdleLink) -> None:
        self._link = link
        self._gap_s: float | None = None
        self._hits: float | None = None  # of a layer
        self._ended_at: float | None = None  # the last step
        self._asked_at: float | None = None  # for the guesses that are open since
        self._ready_at = 0.0  # when they will have been copied
        self._risked_s = 0.0  # what guesses may have cost since the account was settled last

    @property
    def copy_s(self) -> float | None:
        """As in Link."""
        return self._link.copy_s

    @property
    def account(self) -> Account:
        """As in Link."""
        return self._link.account

    def pause(self) -> None:
        """Another pass comes: the time until the next step has ended is not measured."""
        self._ended_at = self._asked_at = None

    def stepped(self, now: float, hits: float, came_true: int) -> None:
        """A step has ended: ``hits`` experts of a layer were in slots, on average; ``came_true`` guesses were used."""
        self._hits = _follow(self._hits, hits)
        if self._ended_at is not None and self.copy_s is not None:
            self.account.settle(now - self._ended_at, came_true * self.copy_s - self._risked_s, self.copy_s)
            self._risked_s = 0.0
        self._ended_at = now

    def asked(self, now: float, num_slots: Sequence[int]) -> None:
        """Guesses are copied from ``now`` on: one for each number of slots, which is that of the guess's layer."""
        self._asked_at = self._ready_at = now
        if self.copy_s is not None:
            self._ready_at += len(num_slots) * self.copy_s
            self._risked_s += self.copy_s * sum(map(self.use_chance, num_slots))

    def launched(self, now: float) -> None:
        """The next step is launched; it starts once the copies under way have arrived."""
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
    """The ``guesses`` that pay, in their order. Each comes with how many layers ahead (from 0) it is.

    ``queued`` copies go before them, and the link is idle for ``idle_s`` until the next layer is routed. What is left
    of a copy then delays that layer's demands. A right guess saves the part of its copy made while the link was idle.
    A wrong one cost an expert its slot; the layer would have used that expert with chance ``victim_chances[ahead]``.
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
    """``Link.use_chance`` of a layer that finds ``hits`` experts in its slots on average; None: not known yet."""
    return min(1.0, (hits or 0.0) / max(1, num_slots))


def _follow(mean: float | None, measured: float) -> float:
    return measured if mean is None else mean + NEW_SHARE * (measured - mean)
