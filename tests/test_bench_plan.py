"""The check of the planner: its machine, its rows, and verdicts that an error cannot hide from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import bench_plan  # noqa: E402
import plan_here  # noqa: E402
from bench_plan import Row  # noqa: E402

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
    assert machine.disk == RESULT["ceilings"]["disk_bytes_per_s"]["4"]
    assert machine.memory == RESULT["ceilings"]["gemv_bytes_per_s"]["bfloat16"]
    resident = rows["1 resident, TPOT"]
    assert resident.planned == pytest.approx(resident.known)


def test_what_a_run_here_takes_stands_beside_what_was_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUOSERVE_CACHE", str(tmp_path))
    for name, few in (("SLOTS", ("25%",)), ("POLICIES", ("lru",)), ("PROMPT", 8), ("NEW_TOKENS", 3), ("ROUNDS", 1)):
        monkeypatch.setattr(plan_here, name, few)
    from_disk, from_ram = plan_here.rows(["bard"], bench_plan.cpu_machine(RESULT))
    assert [from_disk[:4], from_ram[3]] == [["bard", "25%", "lru", "disk"], "RAM"]
    assert len(from_disk) == len(plan_here.HEADING)
    ttft_s, planned_s, error = from_disk[4:7]
    assert float(planned_s) / float(ttft_s) - 1 == pytest.approx(float(error[:-1]) / 100, abs=0.1)
