"""The bench of a predictor's thoughts: a step waits for no more than they take."""

from __future__ import annotations

import pytest

import bench_hearing


def test_a_step_waits_for_a_part_of_its_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_hearing, "TOKENS", 4)
    found = bench_hearing.measure(bench_hearing.Case("mixtral-8x7b", "int4", "h100"))
    assert 0 < found["floor"] <= found["tpot"] <= found["floor"] + found["thoughts"] and found["thoughts"] > 0
