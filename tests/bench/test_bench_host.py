"""The bench of the host's own time: what its made-up device is asked for, and that it misses what it says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import bench_host
from bench_host import CASES


@pytest.mark.parametrize("policy", ["lru", "duoserve"])
@pytest.mark.parametrize("misses", [0, 1, 2])
def test_a_layer_asks_the_device_for_its_misses(policy: str, misses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy lies between two marks, its wait between two, and behind each batch is one for who reads it."""
    monkeypatch.setattr(bench_host, "STEPS", 5)
    case = next(case for case in CASES if case.policy == policy and case.experts == 128 and case.misses == misses)
    found = bench_host.measure(replace(case, layers=4))
    calls = found["calls_per_layer"]
    assert found["as_many_misses"] and found["us_per_layer"] > 0
    assert calls.get("copy", 0) == misses and calls["mark"] <= 1 + 5 * misses
    assert calls.get("passed", 0) <= 6 * misses + 1  # the last of the warm-up among them


def test_a_missing_folder_of_the_result_is_made_and_a_wrong_one_said_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_host, "STEPS", 5)
    monkeypatch.setattr(bench_host, "CASES", [replace(CASES[0], layers=4)])
    out = tmp_path / "results" / "host.json"
    monkeypatch.setattr(sys, "argv", ["bench_host.py", "--rounds", "1", "--json", str(out)])
    bench_host.main()
    assert json.loads(out.read_text())["bench"] == "bench_host"
    assert CASES[0].policy in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench_host.py", "--json", str(out / "host.json")])
    monkeypatch.setattr(bench_host, "run", lambda rounds: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        bench_host.main()
    assert "cannot be written: " in capsys.readouterr().err
