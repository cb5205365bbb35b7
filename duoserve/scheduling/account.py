"""Whether guesses have paid so far, and how many may be open for that. Seconds on the copy engine's clock."""

from __future__ import annotations

# What guesses may have cost in all, as a share of the time in which they could be made.
ALLOWED_TIME = 0.004


class Account:
    """Counts what guesses may risk: what they have saved, less what they have cost, plus ALLOWED_TIME of the time.

    A guess is open until its expert is used or given up. One that is wrong costs a copy at most: it delays a demand, or
    its victim has to come back. No more than ``most_open`` copies are saved up, so that a predictor that was good for a
    million steps cannot waste the gain of them all.
    """

    def __init__(self, most_open: int) -> None:
        self._most_open = most_open
        self._funds_s = 0.0

    def settle(self, seconds: float, saved_s: float, copy_s: float) -> None:
        """A layer took ``seconds`` and, had there been no guesses, would have taken ``saved_s`` more or (< 0) less."""
        self._funds_s = min(self._funds_s + ALLOWED_TIME * seconds + saved_s, self._most_open * copy_s)

    def allows(self, copy_s: float) -> int:
        """How many guesses may be open now."""
        return max(0, int(self._funds_s / copy_s))
