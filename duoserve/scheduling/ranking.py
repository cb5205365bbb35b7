"""What an expert in a slot is worth, judged by the uses so far: the least is given up first.

Plain data and no clock but the steps themselves, so that the same rankings serve the scheduler and offline studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Protocol

from duoserve.config import Phase

# A use counts half after HALF_LIFE decode steps; at a new prompt, what was used before it counts CARRY times as much.
# Measured by cache_study.py on made-up traces of four models, prompts of 1 to 256 tokens, slots for 12.5 and 25 % of
# the experts: 64 and 0.02 to 0.1 are within 0.4 points of the best everywhere (32 to 128, 0.02 to 0.3 tried); 0.3 costs
# up to 3 points. Dividing by the age of the last use on top of that gained nothing.
HALF_LIFE = 64.0
CARRY = 0.05
# Beyond this growth all values are scaled back, long before floats run out.
_RESCALE_AT = 1e30
_EVEN_SHARE = 1e-3


Values = Sequence[Sequence[float]]  # by layer, by expert


class Ranking(Protocol):
    """``values`` are compared over all layers. Of equal ones the least recently used goes."""

    @property
    def values(self) -> Values: ...

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """A forward pass of ``num_tokens`` tokens begins. A prefill brings new requests."""
        ...

    def resume(self, phase: Phase, num_tokens: int) -> None:
        """A pass that began earlier goes on after others: nothing is new, and nothing ages."""
        ...

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """The layer uses ``experts``, the most wanted first, each for ``counts`` of the pass's tokens."""
        ...


class _Values:
    """A value of zero for every expert, and passes that change nothing."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.values = [[0.0] * num_experts for _ in range(num_layers)]

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking."""

    def resume(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking."""


class Recency(_Values):
    """LRU: by the last use. The more wanted of two that are used at once counts as used later."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._uses = 0

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """As in Ranking."""
        self._uses += len(experts)
        values, newest = self.values[layer], self._uses
        for rank, expert in enumerate(experts):
            values[expert] = newest - rank


class Frequency(_Values):
    """LFU: by the number of uses ever."""

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """As in Ranking."""
        values = self.values[layer]
        for expert, count in zip(experts, counts, strict=True):
            values[expert] += count


class DecayedFrequency(_Values):
    """LFRU: the number of uses, each worth less with its age: half after HALF_LIFE steps.

    A prompt's uses are counted as shares: a long one says no more than HALF_LIFE / ln 2 steps do, which is what a use
    in every step adds up to. Uses before it then count only CARRY of what they did.
    """

    def __init__(self, num_layers: int, num_experts: int, half_life: float = HALF_LIFE, carry: float = CARRY) -> None:
        super().__init__(num_layers, num_experts)
        self._growth = 2 ** (1 / half_life)
        self._carry = carry
        self._most = half_life / log(2)
        self._now = 1.0  # what a use counts: it grows, instead of all others shrinking
        self._each = 1.0  # the same for a use by one token of the pass

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking."""
        prefill = phase is Phase.PREFILL
        self._now *= 1 / self._carry if prefill else self._growth
        if self._now > _RESCALE_AT:
            self._rescale()
        self.resume(phase, num_tokens)

    def resume(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking."""
        self._each = self._now * (min(1.0, self._most / num_tokens) if phase is Phase.PREFILL else 1.0)

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """As in Ranking."""
        values, each = self.values[layer], self._each
        for expert, count in zip(experts, counts, strict=True):
            values[expert] += each * count

    def _rescale(self) -> None:
        self.values[:] = [[value / self._now for value in layer] for layer in self.values]
        self._now = 1.0


class LeastStale(_Values):
    """Ranks by how many passes of its layer an expert has sat through unused; the most stale goes first.

    After "Least-Stale" of SpecMD (arXiv 2602.03921): over layers that take turns, recency calls those stale whose
    turn comes next. Here every layer counts its own turns.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._turns = [0] * num_layers

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """As in Ranking."""
        self._turns[layer] += 1
        for expert in experts:
            self.values[layer][expert] = self._turns[layer]


class Activation(_Values):
    """MoE-Infinity's (arXiv 2401.14361): the share of the requests' tokens that used the expert, times how early its
    layer is, for prefetches are the less reliable the fewer layers there are to predict them from.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._weights = [1 - layer / num_layers for layer in range(num_layers)]

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """As in Ranking; a prefill starts the count afresh, and before its first use every expert counts a little."""
        if phase is Phase.PREFILL:
            num_experts = len(self.values[0])
            self.values[:] = [[_EVEN_SHARE * weight] * num_experts for weight in self._weights]

    def used(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """As in Ranking."""
        values, weight = self.values[layer], self._weights[layer]
        for expert, count in zip(experts, counts, strict=True):
            values[expert] += weight * count
