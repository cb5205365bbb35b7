"""The requests of a load test: how many there are, how long they are, and when they come, all drawn from a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

Arrivals = Literal["poisson", "burst"]
ARRIVALS: tuple[Arrivals, ...] = ("poisson", "burst")
BURST = 8  # requests that come at once
# Conversations of ShareGPT have 161 tokens of prompt and 338 of answer on average (Kwon et al., 2023, section 6.1).
# The log-normal spread and its width are our choice: a few requests are many times as long as most.
PROMPT_MEAN, ANSWER_MEAN, SPREAD = 161.0, 338.0, 1.0
TEXT = "the king and queen of night will speak no more to men who come with swords but ask what time has done"


class LoadRequest(NamedTuple):
    """One request: its prompt, of words that most tokenizers have as one token each, and how many tokens it wants."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """``requests`` of up to ``max_prompt`` words and ``max_tokens`` tokens; means are ShareGPT's where these allow."""

    requests: int
    arrivals: Arrivals = "poisson"
    max_prompt: int = 1024
    max_tokens: int = 512
    seed: int = 0

    def asked(self) -> list[LoadRequest]:
        """All requests, in the order in which they come."""
        dice = random.Random(self.seed)
        return [
            LoadRequest(
                " ".join(dice.choices(TEXT.split(), k=_length(dice, PROMPT_MEAN, self.max_prompt))),
                _length(dice, ANSWER_MEAN, self.max_tokens),
            )
            for _ in range(self.requests)
        ]

    def times(self, rate: float) -> list[float]:
        """When each request comes, in seconds, at ``rate`` requests a second on average: singly, or BURST at once."""
        dice = random.Random(self.seed + 1)
        together = BURST if self.arrivals == "burst" else 1
        now, times = 0.0, list[float]()
        while len(times) < self.requests:
            times += [now] * min(together, self.requests - len(times))
            now += dice.expovariate(rate / together)
        return times


def _length(dice: random.Random, mean: float, most: int) -> int:
    """A length from 1 to ``most``; the mean is lowered to a quarter of ``most``, or lengths would often be cut."""
    mean = min(mean, most / 4)
    return max(1, min(most, round(dice.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))
