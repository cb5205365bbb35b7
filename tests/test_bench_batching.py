"""The batching bench: its arithmetic by hand, and all of it on `bard` in a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(BENCH))

import batching_report  # noqa: E402 (the benches are no package)
from batching_rates import row  # noqa: E402

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


def result_with(speedup: float, fcfs: float | None, slo: float | None, experts: str = "disk") -> dict[str, Any]:
    rows = [{"batch": 8, "speedup": speedup, "speedup_range": [1, 2], "over_bound": 1.1, "bound": "disk"}]
    return {"rows": rows, "experts": experts, "goodput": {"fcfs": {"goodput": fcfs}, "slo": {"goodput": slo}}}


@pytest.mark.parametrize(
    ("result", "reached"),
    [
        (result_with(1.6, 2.0, 3.2), [True, True, True]),
        (result_with(1.6, 2.0, 2.9, experts="resident"), [False, True, False]),
        (result_with(1.4, None, 3.2), [False, True, None]),
        (result_with(1.4, None, 3.2) | {"rows": []}, [None, None, None]),
    ],
)
def test_verdicts_hide_nothing(result: dict[str, Any], reached: list[bool | None]) -> None:
    assert [target["reached"] for target in batching_report.targets(result)] == reached


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCH / "bench_batching.py"), "--quick", "--threads", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert [check["passed"] for check in result["checks"]] == [True]
    one, two = result["rows"]
    assert one["experts_per_step"] == 12 and 12 < two["experts_per_step"] <= 24
    assert one["speedup"] == 1 and one["misses_per_step"] > 0
    assert all(trial["attained"] >= 0 for name in ("fcfs", "slo") for trial in result["goodput"][name]["tried"])
    assert "checks the bench and measures nothing" in done.stdout
