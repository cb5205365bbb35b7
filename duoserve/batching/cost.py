"""How long steps take, by what they have taken of late. All times are seconds."""

from __future__ import annotations

FADE = 0.05  # the share of its weight that a measurement loses to each newer one: half after some 14
# A measurement counts as at most this times what was expected: a page fault says nothing of later steps.
OUTLIER = 4.0


class Line:
    """``seconds = start + each * size``, fitted by least squares in which measurements fade with their age.

    Neither part is ever negative: more work never takes less time. While all sizes have been alike, less work is
    assumed to take as long, and more work to take longer in proportion.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._size = 0.0
        self._seconds = 0.0
        self._variance = 0.0
        self._covariance = 0.0

    @property
    def measured(self) -> bool:
        """Whether anything has been measured."""
        return self._weight > 0

    def note(self, size: float, seconds: float) -> None:
        """``size`` units of work took ``seconds``."""
        if self.measured:
            seconds = min(seconds, OUTLIER * self.at(size))
        self._weight = (1 - FADE) * self._weight + 1
        share = 1 / self._weight
        above, over = size - self._size, seconds - self._seconds
        self._size += share * above
        self._seconds += share * over
        self._variance = (1 - share) * (self._variance + share * above * above)
        self._covariance = (1 - share) * (self._covariance + share * above * over)

    def at(self, size: float) -> float:
        """The seconds that ``size`` units are expected to take; 0 before the first measurement."""
        if not self.measured:
            return 0.0
        if self._variance < 1e-6 * self._size * self._size:
            return self._seconds * max(1.0, size / self._size)
        each = max(0.0, self._covariance / self._variance)
        each = min(each, self._seconds / self._size)
        return self._seconds + each * (size - self._size)


class MeasuredCosts:
    """The seconds that decode steps and layers of a prefill are expected to take; 0 until they have been measured."""

    def __init__(self) -> None:
        self._decode = Line()
        self._layer = Line()

    def note_decode(self, batch: int, seconds: float) -> None:
        """A decode step of ``batch`` requests took ``seconds``."""
        self._decode.note(batch, seconds)

    def note_prefill(self, tokens: int, layers: int, seconds: float) -> None:
        """``layers`` layers of a prefill of ``tokens`` took ``seconds``."""
        self._layer.note(tokens, seconds / layers)

    def decode_s(self, batch: int) -> float:
        """The expected seconds of a decode step of ``batch`` requests."""
        return self._decode.at(batch)

    def layer_s(self, tokens: int) -> float:
        """The expected seconds of one layer of a prefill of ``tokens`` tokens."""
        return self._layer.at(tokens)
