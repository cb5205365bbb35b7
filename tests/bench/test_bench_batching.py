"""The batching bench: its arithmetic by hand, and all of it on `bard` in a few steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from batching import report as batching_report
from batching.goodput import Outcome, outcome, summary
from batching.goodput_search import Search, falling, goodput
from batching.rates import row
from duoserve.interface import Objectives, Times
from tests.bench.conftest import Ran

CEILINGS = {"memory_bytes_per_s": 20e9, "disk_bytes_per_s": 1e9, "slot_bytes": 1_000_000, "dense_bytes": 100_000_000}


def played(step_s: float, experts: float, misses: float) -> dict[str, Any]:
    return {"step_s": step_s, "itl_s": [step_s] * 20, "experts_per_step": experts, "misses_per_step": misses}


def test_a_step_is_held_against_what_it_had_to_read() -> None:
    alone = [played(0.020, 16, 10)] * 3
    many = row(8, [played(0.060, 40, 30)] * 3, alone, CEILINGS)
    assert many["tok_s"] == pytest.approx(8 / 0.06) and many["speedup"] == pytest.approx(8 * 20 / 60)
    assert (many["bound"], many["bound_ms"], many["over_bound"]) == ("disk", pytest.approx(30), pytest.approx(2))
    resident = row(8, [played(0.010, 40, 0)] * 3, alone, CEILINGS | {"disk_bytes_per_s": None})
    assert (resident["bound"], resident["bound_ms"]) == ("memory", pytest.approx(7))


def cell(speedup: float, experts: str = "disk") -> dict[str, Any]:
    rows = [{"batch": 8, "speedup": speedup, "speedup_range": [1, 2], "over_bound": 1.1, "bound": "disk"}]
    return {"model": "bard", "experts": experts, "rows": rows}


def served(fcfs: float | None, slo: float | None, attained: float = 0.8) -> dict[str, Any]:
    """``attained``: what first come first served has attained at one request a second, the least that was tried."""
    tried = [{"rate": 1.0, "attained": attained}]
    return {"model": "bard", "seconds": 40.0, "fcfs": {"goodput": fcfs, "tried": tried}, "slo": {"goodput": slo}}


@pytest.mark.parametrize(
    ("cells", "goodputs", "reached"),
    [
        ([cell(1.6)], [served(2.0, 3.2)], [True, True, True]),
        ([cell(1.6, "resident"), cell(1.6)], [served(2.0, 2.9)], [False, True, True, True, False]),
        ([cell(1.4)], [served(None, None), served(1.0, 2.0)], [False, True, None, True]),
        ([], [served(None, 1.6), served(None, 1.4), served(None, 1.6, attained=0.95)], [True, None, None]),
        ([cell(1.4) | {"rows": []}], [], [None, None]),
    ],
)
def test_verdicts_hide_nothing(
    cells: list[dict[str, Any]], goodputs: list[dict[str, Any]], reached: list[bool | None]
) -> None:
    targets = batching_report.targets({"cells": cells, "goodput": goodputs})
    assert [target["reached"] for target in targets] == reached


def test_the_search_goes_up_until_far_below_and_down_until_good() -> None:
    for capacity, rates in ((2.5, [1, 2, 4]), (0.3, [1, 0.5, 0.25]), (100, [1, 2, 4, 8, 16])):
        search = Search(1.0, 2.0, trials=5)
        while (step := search.next_step()) is not None:
            search.tried[step] = 1.0 if search.rate(step) <= capacity else 0.5
        assert search.curve == [(rate, 1.0 if rate <= capacity else 0.5) for rate in sorted(rates)]


def test_a_curve_that_rises_again_is_pooled() -> None:
    assert falling([1.0, 0.8, 0.9, 0.4]) == pytest.approx([1.0, 0.85, 0.85, 0.4])
    assert falling([0.5, 0.7, 0.9]) == pytest.approx([0.7] * 3)


def test_goodput_is_where_the_curve_comes_to_nine_in_ten() -> None:
    assert goodput([(1.0, 1.0), (2.0, 0.95), (4.0, 0.75)]) == pytest.approx(2.5)
    assert goodput([(1.0, 0.87), (2.0, 0.95), (4.0, 0.5)]) == pytest.approx(2 + 2 * 0.01 / 0.41)  # of the mean of both
    assert goodput([(1.0, 0.8), (2.0, 0.9)]) is None and goodput([]) is None
    assert goodput([(1.0, 1.0), (2.0, 0.9)]) is None  # it may be anywhere above


def test_a_request_is_in_time_if_both_of_its_figures_are() -> None:
    outcomes = [Outcome(1.0, 0.1), Outcome(1.1, 0.1), Outcome(1.0, 0.2), Outcome(0.5, 0.0)]
    found = summary(outcomes, Objectives(1.0, 0.1))
    assert (found["attained"], found["first_in_time"], found["later_in_time"]) == (0.5, 0.75, 0.75)
    assert outcome(Times(2.0, 2.0, 3.0, 5.0), tokens=5) == Outcome(1.0, 0.5)
    assert outcome(Times(2.0, 2.0, 3.0, 3.0), tokens=1) == Outcome(1.0, 0.0)


def test_the_command(
    bench_result: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both models, tiny, in one run with one result, whose report can be made anew."""
    decode_mode = ("--decode-mode", "auto")  # to compile takes minutes where nothing is on the disk
    out, printed, result = bench_result("bench_batching", "--quick", "--threads", "1", *decode_mode)
    assert [check["passed"] for check in result["checks"]] == [True] * 4
    assert [(one["model"], one["experts"]) for one in result["cells"]] == [
        (name, experts) for name in ("bard", "random Mixtral") for experts in ("disk", "resident")
    ]
    one, two = result["cells"][0]["rows"]
    assert one["experts_per_step"] == 12 and 12 < two["experts_per_step"] <= 24
    assert one["speedup"] == 1 and one["misses_per_step"] > 0
    assert all(trial["attained"] >= 0 for found in result["goodput"] for trial in found["fcfs"]["tried"])
    assert len(result["targets"]) == 10
    assert "checks the bench and measures nothing" in printed and "![curves](result.svg)" in printed
    drawn = out.with_suffix(".svg").read_bytes()
    monkeypatch.setattr(sys, "argv", ["batching_report.py", str(out)])
    batching_report.main()
    assert capsys.readouterr().out == printed
    assert drawn == out.with_suffix(".svg").read_bytes() and b"by slack" in drawn
