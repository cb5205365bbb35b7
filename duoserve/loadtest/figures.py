"""What the answers to a load amount to: latencies, how many met their objectives, and the search for goodput. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from duoserve.interface import Objectives
from duoserve.metrics import percentile

PERCENTILES = (50, 90, 95, 99)
ATTAINED = 0.9  # of the requests have to meet both objectives at a rate that counts as good


@dataclass(frozen=True)
class Answer:
    """What became of a request. Seconds since the load began; ``pieces_s`` is when each piece came, of thoughts too.

    ``asked_s`` is when it was due, ``late_s`` how much later this side sent it. ``tokens`` is what the server counted,
    or the pieces where it counts none. ``error`` is empty where all went well.
    """

    asked_s: float
    pieces_s: tuple[float, ...] = ()
    tokens: int = 0
    error: str = ""
    late_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """Seconds to the first piece; infinite without one."""
        return self.pieces_s[0] - self.asked_s if self.pieces_s else math.inf

    @property
    def tpot_s(self) -> float:
        """Mean seconds between the tokens after the first; 0 where there is one token."""
        return (self.pieces_s[-1] - self.pieces_s[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def meets(self, objectives: Objectives) -> bool:
        """Whether it came, and in time."""
        return not self.error and objectives.met(self.ttft_s, self.tpot_s)


def attainment(answers: Sequence[Answer], objectives: Objectives) -> float:
    """The share of requests that met both objectives; one that failed did not."""
    return sum(answer.meets(objectives) for answer in answers) / len(answers)


def summary(answers: Sequence[Answer], objectives: Objectives) -> dict[str, Any]:
    """Counts, rates and percentiles in milliseconds, of what was answered; None for those of nothing."""
    good = [answer for answer in answers if not answer.error]
    seconds = max((answer.pieces_s[-1] for answer in good), default=None)
    gaps = [later - earlier for a in good for earlier, later in zip(a.pieces_s, a.pieces_s[1:], strict=False)]
    series = {
        "ttft_ms": [answer.ttft_s for answer in good],
        "tpot_ms": [answer.tpot_s for answer in good if answer.tokens > 1],
        "itl_ms": gaps,
    }
    errors = [answer.error for answer in answers if answer.error]
    return {
        "requests": len(answers),
        "failed": len(errors),
        "first_error": errors[0] if errors else None,
        "seconds": seconds,
        "requests_per_s": len(good) / seconds if seconds else 0.0,
        "tokens_per_s": sum(answer.tokens for answer in good) / seconds if seconds else 0.0,
        "attained": attainment(answers, objectives),
        "late_ms": 1e3 * max((answer.late_s for answer in answers), default=0.0),
        **{name: _percentiles_ms(values) for name, values in series.items()},
    }


def _percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": 1e3 * percentile(seconds, percent) if seconds else None for percent in PERCENTILES}


@dataclass
class GoodputSearch:
    """Tries ``rate``, then twice or half the last until both a good and a bad one are known, then between them.

    A rate is good where ATTAINED of the requests met their objectives. Not more than ``trials``.
    """

    rate: float
    trials: int
    tried: list[tuple[float, float]] = field(default_factory=list)

    @property
    def good(self) -> float | None:
        """The highest rate that was good and below which none was bad; None before there is one."""
        good = (rate for rate, attained in self.tried if attained >= ATTAINED)
        return max((rate for rate in good if self.bad is None or rate < self.bad), default=None)

    @property
    def bad(self) -> float | None:
        """The lowest rate that was bad."""
        return min((rate for rate, attained in self.tried if attained < ATTAINED), default=None)

    def next_rate(self) -> float | None:
        """What to try now; None when it is enough."""
        if len(self.tried) >= self.trials:
            return None
        if not self.tried:
            return self.rate
        if self.bad is None:
            return 2 * max(rate for rate, _ in self.tried)
        return self.bad / 2 if self.good is None else math.sqrt(self.good * self.bad)

    def record(self, rate: float, attained: float) -> None:
        """What came of a trial."""
        self.tried.append((rate, attained))
