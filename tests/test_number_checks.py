"""What counts as a number, and how everything else is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from duoserve.errors import ConfigError, RequestError
from duoserve.number_checks import check_number, checked_integer, is_integer, is_number

NEITHER = [True, False, np.True_, None, "1", b"1", [1], np.array([1]), 1j]


def test_true_and_false_are_no_numbers() -> None:
    assert [value for value in [0, -1, 2**64, 1.0, math.nan, *NEITHER] if is_integer(value)] == [0, -1, 2**64]
    assert [value for value in [0, 2**64, 1.5, math.inf, *NEITHER] if is_number(value)] == [0, 2**64, 1.5, math.inf]


@pytest.mark.parametrize("value", [1, 7])
def test_the_ends_of_a_range_are_in_it(value: int) -> None:
    assert checked_integer(ConfigError, "size", value, 1, 7) == value
    check_number(ConfigError, "size", value, 1, 7)
    assert checked_integer(ConfigError, "size", 2**99, 1) == 2**99


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint64])
def test_an_integer_of_numpy_becomes_one_of_python(kind: type[np.integer[Any]]) -> None:
    found = checked_integer(ConfigError, "size", kind(7), 1, 7)
    assert found == 7 and type(found) is int


@pytest.mark.parametrize("value", [0, 8, 1.0, *NEITHER])
def test_what_is_no_integer_in_the_range_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        checked_integer(ConfigError, "size", value, 1, 7)
    assert str(refused.value) == f"size is {value!r}, but must be an integer in 1..7"


def test_without_a_highest_the_message_has_the_lowest() -> None:
    with pytest.raises(RequestError, match="size is 0, but must be an integer of at least 1"):
        checked_integer(RequestError, "size", 0, 1)


@pytest.mark.parametrize("value", [0.009, 100.1, math.nan, math.inf, *NEITHER])
def test_what_is_no_number_in_the_range_is_refused_by_name(value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        check_number(RequestError, "size", value, 0.01, 100.0)
    assert str(refused.value) == f"size is {value!r}, but must be a number in 0.01..100"
