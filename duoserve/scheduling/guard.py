"""A ranking that must not lose to another: two ghosts, one by each ranking, show which of the two misses less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import sqrt

from duoserve.config import Phase
from duoserve.scheduling.ghost import Ghost
from duoserve.scheduling.ranking import Ranking, Values

# Misses that may be lost to the rival, as a share of the rival's own.
ALLOWED_MISSES = 0.005


class Guard(Ranking):
    """Ranks by ``own`` while its credit allows that, else by ``rival``; without a rival always by ``own``.

    Two caches without slots and without guesses are kept: one by this ranking, one by the rival's. The credit is how
    many more misses the rival's has had, plus ALLOWED_MISSES of all of its misses.

    The credit must cover what ``own`` may lose by chance. Where the two caches differ in n experts, the uses of these
    cancel but for about sqrt(n); a larger loss shows in the credit. So ``own`` begins without credit, and each gain
    lets the cache differ in more experts.
    """

    def __init__(self, own: Ranking, rival: Ranking | None, new_ghost: Callable[[], Ghost]) -> None:
        self.missed = 0  # experts that the layer that was used last would have missed without guesses
        self._own = self._leader = own
        self._rival = rival
        self._ghost, self._rivals_ghost = new_ghost(), new_ghost()
        self._credit = 0.0
        self._apart = [0] * len(self._ghost.slots)  # by layer: experts that only the rival's cache has
        self._num_apart = 0  # their sum
        self._decodes = False

    @property
    def values(self) -> Values:
        """As in Ranking, for the layer that was used last."""
        return self._leader.values

    def become(self, slots: Sequence[Iterable[int]]) -> None:
        """A prompt has gone through the slots: both ghosts begin anew with what these hold now, by layer."""
        self._ghost.become(slots)
        self._rivals_ghost.become(slots)
        self._apart, self._num_apart = [0] * len(self._apart), 0

    def begin(self, phase: Phase, num_tokens: int) -> None:
        self._decodes = phase is Phase.DECODE
        self._own.begin(phase, num_tokens)
        if self._rival is not None:
            self._rival.begin(phase, num_tokens)

    def resume(self, phase: Phase, num_tokens: int) -> None:
        self._decodes = phase is Phase.DECODE
        self._own.resume(phase, num_tokens)
        if self._rival is not None:
            self._rival.resume(phase, num_tokens)

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        if self._rival is not None:
            trusts = self._credit >= sqrt(1 + self._num_apart)
            self._leader = self._own if trusts else self._rival
            self._rival.used(layer, experts, counts)
        self._own.used(layer, experts, counts)
        if self._decodes:
            self.missed = self._ghost.use(layer, experts, self._leader.values)
            if self._rival is not None:
                self._judge(self._rival, layer, experts)

    def _judge(self, rival: Ranking, layer: int, experts: Sequence[int]) -> None:
        rivals = self._rivals_ghost.use(layer, experts, rival.values)
        if not (rivals or self.missed):
            return  # neither cache has changed
        most = self._ghost.num_slots  # more would change nothing today, and let through too much on another day
        self._credit = min(most, self._credit + (1 + ALLOWED_MISSES) * rivals - self.missed)
        apart = len(self._rivals_ghost.slots[layer].keys() - self._ghost.slots[layer].keys())
        self._num_apart += apart - self._apart[layer]
        self._apart[layer] = apart
