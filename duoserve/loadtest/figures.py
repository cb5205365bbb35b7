"""Figures of the answers to a load: latencies, attainment of objectives, and the search for goodput. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duoserve.interface import Objectives
from duoserve.metrics import percentile

PERCENTILES = (50, 90, 95, 99)
ATTAINED = 0.9  # a rate is good if this share of the requests meets both objectives


@dataclass(frozen=True)
class Answer:
    """The answer to a request. Times are seconds since the load began; ``pieces_s`` has one for each piece of text.

    Pieces of thoughts count too. ``asked_s`` is when the request was due, ``late_s`` how much later it was sent.
    ``tokens`` is the server's count, or the number of pieces if it does not count. ``error`` is empty if all went well.
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
        """Mean seconds of each token after the first; 0 if there is only one."""
        return (self.pieces_s[-1] - self.pieces_s[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def meets(self, objectives: Objectives) -> bool:
        """Whether the answer came, and in time."""
        return not self.error and objectives.met(self.ttft_s, self.tpot_s)


def attainment(answers: Sequence[Answer], objectives: Objectives) -> float:
    """The share of requests that met both objectives; a request that failed did not."""
    return sum(answer.meets(objectives) for answer in answers) / len(answers)


def summary(answers: Sequence[Answer], objectives: Objectives) -> dict[str, Any]:
    """Counts, rates, and percentiles of what was answered, in milliseconds; None where nothing was.

    ``attained`` is None if there are no objectives.
    """
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
        "attained": None if objectives == Objectives() else attainment(answers, objectives),
        "late_ms": 1e3 * max((answer.late_s for answer in answers), default=0.0),
        **{name: _percentiles_ms(values) for name, values in series.items()},
    }


def said_of(found: Mapping[str, Any]) -> str:
    """How many requests failed by their ``summary``, and where there are objectives, how many met them."""
    attained = found["attained"]
    inside = "" if attained is None else f"{attained:.0%} inside objectives, "
    return f"{inside}{found['failed']} of {found['requests']} failed"


def _percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": 1e3 * percentile(seconds, percent) if seconds else None for percent in PERCENTILES}


@dataclass
class GoodputSearch:
    """Tries ``rate``, then twice or half the last until both a good and a bad rate are known, then rates in between.

    A rate is good if the share ATTAINED of the requests met their objectives. There are at most ``trials``.
    """

    rate: float
    trials: int
    tried: list[tuple[float, float]] = field(default_factory=list)

    @property
    def good(self) -> float | None:
        """The highest good rate below which no rate was bad; None if there is none yet."""
        good = (rate for rate, attained in self.tried if attained >= ATTAINED)
        return max((rate for rate in good if self.bad is None or rate < self.bad), default=None)

    @property
    def bad(self) -> float | None:
        """The lowest bad rate; None if there is none yet."""
        return min((rate for rate, attained in self.tried if attained < ATTAINED), default=None)

    def next_rate(self) -> float | None:
        """The rate to try next; None when the search has ended."""
        if len(self.tried) >= self.trials:
            return None
        if not self.tried:
            return self.rate
        if self.bad is None:
            return 2 * max(rate for rate, _ in self.tried)
        return self.bad / 2 if self.good is None else math.sqrt(self.good * self.bad)

    def record(self, rate: float, attained: float) -> None:
        """Notes the share of requests that met their objectives at ``rate``."""
        self.tried.append((rate, attained))
