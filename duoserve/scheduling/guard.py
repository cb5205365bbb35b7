"""A ranking that must not lose to another: caches of which there are only the books say which of the two to go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from duoserve.config import Phase
from duoserve.scheduling.ghost import Ghost
from duoserve.scheduling.ranking import Ranking, Values

# Misses that may be lost to the rival, as a share of the rival's own.
ALLOWED = 0.005
# What an expert that the rival's cache has and ours lacks is taken to cost: at worst it is a miss, and often none.
PRICE_APART = 0.5


class Guard(Ranking):
    """``own`` as far as it has earned that, else ``rival`` (None: always ``own``), judged by caches without guesses.

    The credit is how many misses the rival has had more, and ALLOWED of all that it had. It must cover what going over
    to the rival would cost: our cache lacks some experts that the rival's has, and each may be missed once before the
    two are the same. So ``own`` begins with nothing, and what it gains lets it depart further: beyond a first miss,
    which is paid in full, at PRICE_APART.
    """

    def __init__(self, own: Ranking, rival: Ranking | None, new_ghost: Callable[[], Ghost]) -> None:
        self.missed = 0  # experts that the layer that was used last would have missed without guesses
        self._own = self._leader = own
        self._rival = rival
        self._ghost, self._rivals_ghost = new_ghost(), new_ghost()
        self._credit = 0.0
        self._apart = [0] * len(self._ghost.slots)  # by layer: experts that only the rival's cache has
        self._decodes = False

    @property
    def values(self) -> Values:
        """As in Ranking, for the layer that was used last."""
        return self._leader.values

    def become(self, slots: Sequence[Iterable[int]]) -> None:
        """A prompt has gone through the cache: these experts, by layer, are in it now, and so they are for the rival."""
        self._ghost.become(slots)
        self._rivals_ghost.become(slots)
        self._apart = [0] * len(self._apart)

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking."""
        self._decodes = phase is Phase.DECODE
        self._own.begin(phase, num_tokens)
        if self._rival is not None:
            self._rival.begin(phase, num_tokens)

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """As in Ranking."""
        if self._rival is not None:
            trusted = self._credit >= 1 + PRICE_APART * sum(self._apart)
            self._leader = self._own if trusted else self._rival
            self._rival.used(layer, experts, counts)
        self._own.used(layer, experts, counts)
        if self._decodes:
            self.missed = self._ghost.use(layer, experts, self._leader.values)
            if self._rival is not None:
                self._judge(self._rival, layer, experts)

    def _judge(self, rival: Ranking, layer: int, experts: Sequence[int]) -> None:
        rivals = self._rivals_ghost.use(layer, experts, rival.values)
        most = self._ghost.num_slots  # more would change nothing today, and let through too much on another day
        self._credit = min(most, self._credit + (1 + ALLOWED) * rivals - self.missed)
        self._apart[layer] = len(self._rivals_ghost.slots[layer].keys() - self._ghost.slots[layer].keys())
