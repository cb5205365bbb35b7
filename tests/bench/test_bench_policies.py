"""The bench of policies in replay: its bound holds, and a result has what it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import bench_policies
from bench_policies import Claim, Table, verdict, what_is_possible
from duoserve.predictors.training import train
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from tests.traces.drawn import drawn_trace

MACHINE = Machine(Hardware("small", 1e9, 1e12, 1e15, 0.0, 1e-6), LayerSizes("small", 1_000_000, 8, 1_000_000, 64))


@pytest.mark.parametrize("slots", [14, 30])
def test_nothing_is_beyond_the_bound(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = train(drawn_trace(seed=1), "lookahead")
    claim = Claim("small", MACHINE, drawn_trace(), slots, {"paper": told, "duoserve": told})
    monkeypatch.setattr(bench_policies, "claims", lambda: (claim,))
    heading, *rows = what_is_possible()
    assert {len(row) for row in rows} == {len(heading)}
    ratios = {row[1]: float(row[-2].removesuffix("x")) for row in rows}
    copies = {row[1]: float(row[4]) for row in rows}
    assert list(ratios) == ["duoserve-paper", "lru", "duoserve", "oracle", "link bound"]
    assert ratios["duoserve-paper"] == 1.0 < ratios["lru"] < ratios["oracle"] < ratios["link bound"]
    assert copies["oracle"] < 1.2 * copies["link bound"]
    assert max(ratios.values()) == ratios["link bound"] and min(copies.values()) == copies["link bound"] > 0


def test_a_verdict_tells_what_was_missed_from_what_cannot_be() -> None:
    said = [verdict(times, bound) for times, bound in ((2.0, 3.0), (1.9, 2.0), (1.9, 1.99))]
    assert said == ["2x reached", "2x NOT reached", "2x NOT reached, nor can it be"]


def test_a_result_has_its_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"one": Table("Title", lambda: iter([["a", "b"], ["1", "2"]]), "A note."), "two": Table("Other", list)}
    monkeypatch.setattr(bench_policies, "TABLES", tables)
    out = tmp_path / "policies.json"
    monkeypatch.setattr(sys, "argv", ["bench_policies.py", "one", "--json", str(out)])
    bench_policies.main()
    result = json.loads(out.read_text())
    assert {"command", "date", "machine", "versions", "seconds"} <= result.keys()
    assert [table["rows"] for table in result["tables"]] == [[["a", "b"], ["1", "2"]]]
    said = out.with_suffix(".md").read_text()
    assert "## Title" in said and "A note." in said and "| 1 | 2 |" in said and "## Other" not in said
    assert str(result["versions"]["python"]) in said and result["machine"]["kernel"] in said
