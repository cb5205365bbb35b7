"""The checks of the planner: their machines, their rows, and verdicts that an error cannot hide from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import bench_plan
import plan_here
import plan_here_report
from bench_plan import Row
from duoserve.planning import rehearsal
from plan_here_report import Verdict, report

BENCH = Path(__file__).resolve().parents[2] / "bench"
RESULT = json.loads((BENCH / "results" / "cpu-epyc-2026-11-23.json").read_text())


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    found = [*bench_plan.measured_rows(RESULT), *bench_plan.published_rows()]
    return {f"{number} {row.what}": row for number, row in enumerate(found)}


def test_every_row_is_within_30_percent_or_says_why_not(rows: dict[str, Row]) -> None:
    assert len(rows) > 25
    assert [what for what, row in rows.items() if not row.cells[-1]] == []


def test_what_is_not_known_has_no_error(rows: dict[str, Row]) -> None:
    unknown = [row for row in rows.values() if row.known is None or row.planned is None]
    assert len(unknown) == 2
    assert all(row.cells[4] == "-" and row.why for row in unknown)


def test_an_error_beyond_30_percent_shows_its_reason() -> None:
    assert Row("x", "s", 1.0, 1.29, "no").cells[-2:] == ["+29%", "within 30 %"]
    assert Row("x", "s", 1.0, 1.31, "the link").cells[-2:] == ["+31%", "the link"]
    assert Row("x", "s", 1.0, 0.69, "").cells[-2:] == ["-31%", ""]


def test_the_machine_is_the_results_own_and_its_resident_decode_is_met(rows: dict[str, Row]) -> None:
    machine = bench_plan.cpu_machine(RESULT)
    assert machine.disk == RESULT["ceilings"]["disk_bytes_per_s"]["2"]
    assert machine.memory == RESULT["ceilings"]["gemv_bytes_per_s"]["bfloat16"]
    resident = rows["1 resident, TPOT"]
    assert resident.planned == pytest.approx(resident.known)


def test_the_planner_has_the_copy_threads_of_the_result() -> None:
    ceilings = RESULT["ceilings"]["disk_bytes_per_s"]
    known = RESULT["summary"]["duoserve layer-prefetch"]
    one = known | {"decode_read_mb_per_token": {"median": 162.2}}
    single = RESULT | {"copy_threads": 1, "summary": RESULT["summary"] | {"duoserve layer-prefetch": one}}
    assert bench_plan.cpu_machine(single).disk == ceilings["1"]
    text = bench_plan.report(single, "x.json")
    assert "`copy_threads=1`" in text and "2 experts" not in text
    assert "an expert\ntoo many" in text and "(0.9 in this one)" in text
    both = bench_plan.report(RESULT, "x.json")
    assert "2 experts\ntoo many" in both and "(2.0 in this one)" in both


def test_a_run_that_read_faster_than_the_probe_says_so(rows: dict[str, Row]) -> None:
    row = rows["7 layer-prefetch, TPOT"]
    assert row.cells[-2:] == ["+35%", "it read at least 1.58 GB/s, the probe 1.02"]


def test_a_quick_run_here_has_every_cell_with_its_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUOSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(plan_here, "this_machine", lambda folder, anew: bench_plan.cpu_machine(RESULT))
    monkeypatch.setattr(plan_here, "TRIES", 1)
    for name, few in (("STEPS", 3), ("PROMPTS", 1), ("MOST_PROMPTS", 1), ("LAYERS", 2)):
        monkeypatch.setattr(rehearsal, name, few)
    out = tmp_path / "here.json"
    monkeypatch.setattr(sys, "argv", ["plan_here.py", "bard", "--quick", "--json", str(out), "--folder", str(tmp_path)])
    plan_here.main()
    result = json.loads(out.read_text())
    ways = {(cell["model"], cell["slots"], cell["policy"], cell["tier"]) for cell in result["cells"]}
    assert ways == {("bard", "50%", policy, tier) for policy in ("lru", "on-demand") for tier in ("disk", "ram")}
    for cell in result["cells"]:
        (done,) = cell["rounds"]
        assert all(done[name] > 0 for _, _, *names, _ in plan_here_report.FIGURES for name in names)
        assert (done["hits"] > 0) == (done["planned_hits"] > 0) == (cell["policy"] == "lru")
    assert result["checks"] == {"bard: the same tokens in every cell": True}


def here(*rounds: tuple[float, float]) -> dict[str, object]:
    """A cell whose TTFT, and TPOT too, was measured and planned so in each round."""
    names = ("ttft_s", "planned_ttft_s", "tpot_s", "planned_tpot_s")
    done = [dict(zip(names, 2 * pair, strict=True)) | {"tpot_s_by_hits": pair[1]} for pair in rounds]
    others = {"hits": 0.5, "planned_hits": 0.6, "foreign_cpu": 0.01}
    return {"model": "m", "slots": "50%", "policy": "lru", "tier": "disk", "rounds": [one | others for one in done]}


def test_an_error_is_that_of_pairs_and_beyond_15_percent_it_is_off() -> None:
    """The machine doubles its time in the third round, and the plan follows."""
    cell = here((1.0, 1.1), (1.0, 1.14), (2.0, 2.4))
    verdict = Verdict.of(cell["rounds"], "ttft_s", "planned_ttft_s")
    assert verdict.error == pytest.approx(0.14)
    assert verdict.within
    assert not Verdict.of(here((1.0, 1.16))["rounds"], "ttft_s", "planned_ttft_s").within
    assert not Verdict.of(here((1.0, 0.84))["rounds"], "ttft_s", "planned_ttft_s").within


def test_the_report_counts_what_is_off_and_warns_of_others() -> None:
    conditions = {
        "machine": {
            "cores": 2,
            "cpu": "X",
            "isa": ["avx2"],
            "ram_bytes": 1 << 30,
            "disk": dict.fromkeys(("filesystem", "source"), "d"),
        },
        "versions": {"commit": "abc", "torch": "2"},
        "size": {"prompt": 8, "new_tokens": 4},
        "command": "python",
        "date": "today",
        "hardware": {"disk": 1e9},
        "checks": {"same tokens": False},
        "others_before": 0.01,
        "others_after": 0.02,
    }
    text = report(conditions | {"cells": [here((1.0, 1.0)), here((1.0, 2.0), (1.0, 1.0), (1.0, 1.0))]})
    assert "- TTFT: 2 of 2 within 15%, the worst +0%" in text
    assert "- TTFT, if the first round's rehearsal is kept for all: 1 of 2 within 15%, the worst +100%" in text
    assert "- same tokens: FAILED" in text
    assert "Warning" not in text
    off = here((1.0, 1.2))
    off["rounds"][0]["foreign_cpu"] = 0.3
    text = report(conditions | {"cells": [off]})
    assert "**off**" in text and "others used up to 30% of its CPU time" in text


def test_a_run_that_others_disturb_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter((0.5, 0.2, 0.9, 0.01))

    class Foreign:
        share = 0.0

        @contextmanager
        def measure(self) -> Iterator[None]:
            yield
            self.share = next(shares)

    monkeypatch.setattr(plan_here, "ForeignCpu", Foreign)
    runs = iter(range(10))
    assert plan_here.undisturbed(lambda: next(runs)) == (1, 0.2)
    assert plan_here.undisturbed(lambda: next(runs)) == (3, 0.01)
