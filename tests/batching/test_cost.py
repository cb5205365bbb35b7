"""What steps are expected to take, by what they have taken."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duoserve.batching.cost import Line, MeasuredCosts


def test_nothing_is_known_before_the_first_measurement() -> None:
    costs = MeasuredCosts()
    assert costs.decode_s(8) == 0 and costs.layer_s(1000) == 0
    assert not Line().measured


def test_one_size_says_that_more_costs_in_proportion_and_less_the_same() -> None:
    costs = MeasuredCosts()
    costs.note_prefill(100, layers=4, seconds=8.0)
    assert costs.layer_s(100) == costs.layer_s(10) == pytest.approx(2.0)
    assert costs.layer_s(300) == pytest.approx(6.0)


def test_two_sizes_make_a_line() -> None:
    costs = MeasuredCosts()
    for _ in range(20):
        for batch in (1, 4):
            costs.note_decode(batch, 0.010 + 0.002 * batch)
    assert costs.decode_s(8) == pytest.approx(0.026, rel=0.01)
    assert costs.decode_s(2) == pytest.approx(0.014, rel=0.01)


def test_it_follows_a_machine_that_has_become_slower() -> None:
    line, rng = Line(), random.Random(0)
    for factor in (1.0, 3.0):
        for _ in range(120):
            size = rng.randrange(1, 17)
            line.note(size, factor * (0.01 + 0.001 * size) * rng.uniform(0.95, 1.05))
        assert line.at(12) == pytest.approx(factor * 0.022, rel=0.1)


def test_one_hiccup_is_not_believed() -> None:
    line = Line()
    for _ in range(50):
        line.note(4, 0.01)
    line.note(4, 10.0)
    assert line.at(4) < 0.013


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-6, 10)), min_size=1, max_size=60))
def test_more_work_never_takes_less_time_and_none_takes_less_than_nothing(noted: list[tuple[int, float]]) -> None:
    line = Line()
    for size, seconds in noted:
        line.note(size, seconds)
    expected = [line.at(size) for size in (1, 2, 10, 100, 1000, 10_000)]
    assert expected == sorted(expected)
    assert all(-1e-9 <= seconds < 1e6 for seconds in expected)
