"""The search for goodput: which rates to try, and where between them nine in ten are inside objectives. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

ATTAINED = 0.9
FAR_BELOW = 0.75  # a curve is followed up to here


@dataclass
class Search:
    """Rates ``start * growth**k``: up until attainment is far below ATTAINED, down until it is not below.

    Not more than ``trials`` of them.
    """

    start: float
    growth: float
    trials: int
    tried: dict[int, float] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """Requests a second."""
        return self.start * self.growth**step

    def next_step(self) -> int | None:
        """The ``k`` to try now; None when it is enough."""
        if not self.tried:
            return 0
        if len(self.tried) >= self.trials:
            return None
        lowest, highest = min(self.tried), max(self.tried)
        if self.tried[lowest] < ATTAINED:
            return lowest - 1
        return highest + 1 if self.tried[highest] >= FAR_BELOW else None

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Rates in ascending order and the shares that were inside objectives."""
        return [(self.rate(step), self.tried[step]) for step in sorted(self.tried)]


def falling(values: Sequence[float]) -> list[float]:
    """The sequence that never rises and is nearest to ``values`` (least squares): neighbours that rise are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (right, n), (left, m) = pools.pop(), pools.pop()
            pools.append(((left * m + right * n) / (m + n), m + n))
    return [mean for mean, count in pools for _ in range(count)]


def goodput(curve: Sequence[tuple[float, float]]) -> float | None:
    """The rate at which the falling curve through the trials, straight between them, comes to ATTAINED.

    None where no rate was good, or all were.
    """
    rates = [rate for rate, _ in curve]
    smooth = list(zip(rates, falling([attained for _, attained in curve]), strict=True))
    if not smooth or smooth[0][1] < ATTAINED:
        return None
    for (rate, before), (higher, after) in pairwise(smooth):
        if after < ATTAINED:
            return rate + (higher - rate) * (before - ATTAINED) / (before - after)
    return None
