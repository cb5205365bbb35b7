"""A machine whose parts were timed, on one model and prompts of one length: for replays held against reality."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from duoserve.replaying.hardware import Machine


@dataclass(frozen=True)
class PassTimes:
    """Seconds of a pass: ``before`` in each layer up to the router's choice, ``rest`` outside of the layers.

    ``hearing`` in each layer for a listener that wants no scores, ``scores`` for those of each layer ahead. ``fresh``
    with each expert that has just been copied, ``cold`` with each that lay in its slot before. ``roused`` with each
    thread that is woken to read beside the computing, ``ended`` with each read that ends beside it.
    """

    before: float = 0.0
    rest: float = 0.0
    hearing: float = 0.0
    scores: float = 0.0
    fresh: float = 0.0
    cold: float = 0.0
    roused: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class TimedMachine(Machine):
    """``prompt`` and ``step`` are the times of a prompt's pass and of a decode step of one token.

    ``experts`` has, ascending, for how many tokens an expert was computed and what that took, ``launch`` what it takes
    beyond that to compute some of them together.
    """

    prompt: PassTimes
    step: PassTimes
    experts: Sequence[tuple[int, float]]
    launch: float

    def attention_s(self, tokens: int, context: int, sequences: int = 1) -> float:
        """As in Machine, whatever the context is."""
        return self._times(tokens).before

    def expert_s(self, tokens: float) -> float:
        """As in Machine: on the line through the two nearest counts that were timed."""
        counts = [count for count, _ in self.experts]
        at = min(max(1, bisect_left(counts, tokens)), len(counts) - 1)
        (few, some_s), (many, more_s) = self.experts[at - 1 : at + 1]
        return some_s + (more_s - some_s) * (tokens - few) / (many - few)

    def rest_s(self, tokens: int) -> float:
        """As in Machine."""
        return self._times(tokens).rest

    def hearing_s(self, tokens: int, lookahead: int) -> float:
        """As in Machine."""
        times = self._times(tokens)
        return times.hearing + lookahead * times.scores

    @property
    def launch_s(self) -> float:
        """As in Machine."""
        return self.launch

    def fresh_s(self, tokens: int) -> float:
        """As in Machine."""
        return self._times(tokens).fresh

    def cold_s(self, tokens: int) -> float:
        """As in Machine."""
        return self._times(tokens).cold

    def disturbed_s(self, tokens: int) -> tuple[float, float]:
        """As in Machine."""
        times = self._times(tokens)
        return times.roused, times.ended

    def with_times(self, prompt: PassTimes, step: PassTimes) -> Self:
        """The same with other times of passes."""
        return replace(self, prompt=prompt, step=step)

    def _times(self, tokens: int) -> PassTimes:
        return self.step if tokens == 1 else self.prompt
