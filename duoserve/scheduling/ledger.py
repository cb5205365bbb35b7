"""Follows prefetched copies to their end, so that each copied byte is counted as useful, late or wasted."""

from __future__ import annotations

from collections.abc import Callable

from duoserve.experts.layout import ExpertId
from duoserve.metrics import Meter


class Ledger:
    """Follows each prefetch from a guess to its use.

    A copy is a *guess* from its prefetch until a layer asks for its expert. A guess that arrives before that is
    *unused*: its bytes count as ``prefetched_useful`` once it is asked for, as ``wasted`` if it is given up first. If a
    copy is cancelled half-way, what had been moved of it is ``wasted``.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._late: set[ExpertId] = set()
        self.guesses: dict[ExpertId, None] = {}  # under way, oldest first
        self.unused: dict[ExpertId, int] = {}  # arrived, oldest first, and their bytes

    def guess(self, expert: ExpertId) -> None:
        """A copy is under way that no layer waits for: a new prefetch, or one whose layer no longer wants it."""
        self._late.discard(expert)
        self.guesses[expert] = None

    def asked_under_way(self, expert: ExpertId) -> bool:
        """A layer asks for an expert whose copy is under way; gives whether that copy was a guess until now."""
        if expert not in self.guesses:
            return False
        del self.guesses[expert]
        self._late.add(expert)
        return True

    def arrived(self, expert: ExpertId, nbytes: int) -> None:
        """A copy of ``nbytes`` has arrived; counts them, unless it is a guess, which is yet to be used."""
        if expert in self.guesses:
            del self.guesses[expert]
            self.unused[expert] = nbytes
        elif expert in self._late:
            self._late.discard(expert)
            self._meter.bytes.prefetched_late += nbytes
        else:
            self._meter.bytes.demanded += nbytes

    def dropped(self, expert: ExpertId, nbytes: int = 0) -> None:
        """A copy has failed, or was cancelled when ``nbytes`` of it had been moved for nothing."""
        self.guesses.pop(expert, None)
        self._late.discard(expert)
        self._meter.bytes.wasted += nbytes

    def restore(self, is_ready: Callable[[ExpertId], bool]) -> None:
        """No copy is under way, and the unused guesses that are not READY have lost their slots, whatever was told."""
        for expert in [*self.guesses, *self._late]:
            self.dropped(expert)
        for expert in [guess for guess in self.unused if not is_ready(guess)]:
            self.given_up(expert)

    def used(self, expert: ExpertId) -> None:
        """A layer asks for an expert that is READY: if it was an unused guess, its bytes were useful."""
        if expert in self.unused:
            self._meter.bytes.prefetched_useful += self.unused.pop(expert)

    def given_up(self, expert: ExpertId) -> None:
        """A READY expert loses its slot: if it was an unused guess, its bytes were wasted."""
        if expert in self.unused:
            self._meter.bytes.wasted += self.unused.pop(expert)
