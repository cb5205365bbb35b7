"""Busy time and overlap of two lanes, against a count of ticks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duoserve import timeline
from duoserve.timeline import Timeline

INTERVAL = st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def ticks(intervals: list[tuple[int, int]]) -> set[int]:
    return {tick for start, stop in intervals for tick in range(start, stop)}


@given(copies=st.lists(INTERVAL), computes=st.lists(INTERVAL), stalls=st.lists(INTERVAL), until=st.integers(0, 80))
def test_totals_are_those_of_a_count(
    copies: list[tuple[int, int]], computes: list[tuple[int, int]], stalls: list[tuple[int, int]], until: int
) -> None:
    lanes, busy = Timeline(0.0), ticks(computes)
    for copy in copies:
        lanes.add_copy(*copy)
    for tick in sorted(busy):
        lanes.start_compute(tick)
        lanes.stop_compute(tick + 1)
    waited = sum(lanes.add_stall(*stall) for stall in stalls)
    assert waited == len(busy & ticks(stalls))
    moved = {tick for tick in ticks(copies) if tick < until}
    assert lanes.totals(until) == (len(moved), len((moved & busy) - ticks(stalls)))


def test_a_running_computation_counts() -> None:
    lanes = Timeline(0.0)
    lanes.start_compute(1.0)
    lanes.add_copy(0.0, 3.0)
    assert lanes.totals(2.5) == (2.5, 1.5)


def test_a_stall_is_told_of_while_the_computation_runs_and_no_second_of_it_twice() -> None:
    lanes = Timeline(0.0)
    lanes.start_compute(1.0)
    lanes.add_copy(0.0, 8.0)
    assert [lanes.add_stall(0.0, 3.0), lanes.add_stall(2.0, 4.0), lanes.add_stall(2.5, 3.5)] == [2.0, 1.0, 0.0]
    lanes.stop_compute(6.0)
    assert lanes.totals(8.0) == (8.0, 2.0)


def test_what_was_before_the_start_does_not_count() -> None:
    lanes = Timeline(10.0)
    lanes.add_copy(8.0, 9.0)
    lanes.add_copy(9.0, 12.0)
    assert lanes.totals(20.0) == (2.0, 0.0)


@pytest.mark.parametrize("computing", ["throughout", "in pieces"])
def test_folding_keeps_the_totals_and_bounds_the_memory(computing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "FOLD_AT", 16)
    lanes = Timeline(0.0)
    lanes.start_compute(0.0)
    for i in range(1000):  # two copies at a time: each takes 1.5 seconds, and one starts every second
        lanes.add_copy(i, i + 1.5)
        lanes.add_stall(i + 0.125, i + 0.25)
        if computing == "in pieces":
            lanes.stop_compute(i + 0.25)
            lanes.start_compute(i + 1.0)
    transfer, overlap = lanes.totals(1000.0)
    assert transfer == pytest.approx(1000)
    assert overlap == pytest.approx(875 if computing == "throughout" else 125)
    assert len(lanes._copies) < 32 and len(lanes._computes) < 32
