"""Latencies, attainment and the search for goodput, by hand-made answers."""

from __future__ import annotations

import json

import pytest

from duoserve.interface import Objectives
from duoserve.loadtest.figures import Answer, GoodputSearch, attainment, summary

# 1 s to the first token, then 0.5 s a token; the second failed; the third is one token.
ANSWERS = [Answer(1.0, (2.0, 2.5, 3.0), 3), Answer(0.0, error="500: x"), Answer(2.0, (2.25,), 1)]


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "share"), [(None, None, 2), (1.0, 0.5, 2), (0.99, None, 1), (None, 0.49, 1), (0.1, None, 0)]
)
def test_an_objective_is_met_up_to_its_limit(ttft_s: float | None, tpot_s: float | None, share: int) -> None:
    assert attainment(ANSWERS, Objectives(ttft_s, tpot_s)) == pytest.approx(share / 3)


def test_a_summary_leaves_failures_out_of_latencies() -> None:
    found = summary(ANSWERS, Objectives())
    assert (found["requests"], found["failed"], found["first_error"]) == (3, 1, "500: x")
    assert (found["seconds"], found["tokens_per_s"]) == (3.0, pytest.approx(4 / 3))
    assert (found["ttft_ms"]["p50"], found["ttft_ms"]["p99"]) == (250.0, 1000.0)
    assert found["tpot_ms"]["p99"] == found["itl_ms"]["p50"] == 500.0


def test_what_there_is_none_of_is_none_and_no_nan() -> None:
    for answers in ([Answer(0.0, error="429")], [Answer(0.0, (1.0,), 1)]):
        found = json.loads(json.dumps(summary(answers, Objectives()), allow_nan=False))
        assert found["tpot_ms"]["p50"] is None and found["late_ms"] == 0
    assert summary([Answer(0.0, error="429")], Objectives())["requests_per_s"] == 0


@pytest.mark.parametrize("capacity", [0.03, 0.9, 1.0, 7.3, 200.0])
def test_goodput_is_found_from_both_sides(capacity: float) -> None:
    search = GoodputSearch(rate=1.0, trials=20)
    while (rate := search.next_rate()) is not None:
        search.record(rate, 1.0 if rate <= capacity else 0.5)
    assert search.good is not None and search.bad is not None
    assert search.good <= capacity < search.bad <= 1.02 * search.good


def test_a_good_trial_above_a_bad_one_was_luck() -> None:
    search = GoodputSearch(1.0, 4)
    search.tried = [(1.0, 1.0), (4.0, 0.95), (2.0, 0.5)]
    assert (search.good, search.bad) == (1.0, 2.0)


def test_the_search_ends() -> None:
    never = GoodputSearch(8.0, 3)
    rates = []
    while (rate := never.next_rate()) is not None:
        rates.append(rate)
        never.record(rate, 0.0)
    assert rates == [8.0, 4.0, 2.0] and never.good is None and never.bad == 2.0
