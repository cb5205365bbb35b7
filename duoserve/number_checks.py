"""Which values are numbers, and the refusal of those that are none or out of range.

To Python, True and False are integers. Nobody who gives one means a number, so here they are none.
"""

from __future__ import annotations

from numbers import Integral
from typing import TypeGuard

from duoserve.errors import DuoServeError


def is_integer(value: object) -> TypeGuard[int]:
    """Whether the value is an integer, of Python or of NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is an integer or a float; NaN and infinities are floats."""
    return is_integer(value) or isinstance(value, float)


def checked_integer(error: type[DuoServeError], name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int; raises ``error`` unless it is an integer in ``low..high``, or of at least ``low``."""
    if not is_integer(value) or value < low or (high is not None and value > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        raise error(f"{name} is {value!r}, but must be {allowed}")
    return int(value)


def check_number(error: type[DuoServeError], name: str, value: object, low: float, high: float) -> None:
    """Raises ``error`` unless the value is a number in ``low..high``."""
    if not is_number(value) or not low <= value <= high:  # NaN fails every comparison
        raise error(f"{name} is {value!r}, but must be a number in {low:g}..{high:g}")
