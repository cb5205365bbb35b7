"""Policies side by side."""

from __future__ import annotations

import json

import pytest

from duoserve.errors import ConfigError
from duoserve.experts import budget
from duoserve.scheduling.bake_off import CONTESTANTS, bake_off, contestants, figures, slot_count, table
from duoserve.scheduling.hardware import Hardware, LayerSizes, Machine
from tests.scheduling.fortune import Teller, certain
from tests.scheduling.traces import drawn_trace

MACHINE = Machine(Hardware("even", 1e10, 1e11, 1e14, 0.0, 1e-4), LayerSizes("small", 1_000_000, 8, 1_000_000, 64))


def test_everybody_is_all_but_resident_and_the_oracle() -> None:
    assert contestants("all") == list(CONTESTANTS)
    assert "resident" not in CONTESTANTS and CONTESTANTS[-1] == "oracle"
    assert contestants("lru, oracle") == ["lru", "oracle"]
    with pytest.raises(ConfigError, match="'mru' is not known"):
        contestants("lru,mru")


def test_slots_are_counts_or_shares() -> None:
    trace = drawn_trace(requests=1, tokens=2)
    assert [slot_count(wanted, trace) for wanted in ("25%", "12.5%", "96", "3")] == [24, 12, 96, 3]
    with pytest.raises(ConfigError, match=r"2 is 2 slots.*3\.\.96"):
        slot_count("2", trace)
    for share in ("12.5%", "35%", "52.6%", "99.9%"):
        assert slot_count(share, trace) == budget.slot_count(share, 96)  # what an engine has
    for wrong in ("many", "nan%", "inf%"):
        with pytest.raises(ConfigError, match="neither a count nor a share"):
            slot_count(wrong, trace)


def test_rows_come_by_slots_and_policy_and_a_predictor_goes_to_its_own_kind() -> None:
    predictors = {"lookahead": Teller(lambda layer: certain(16, [1, 2]))}
    names = ["lru", "lookahead", "duoserve", "oracle"]
    runs = list(bake_off(drawn_trace(), MACHINE, [12, 48], names, predictors))
    assert [(run.num_slots, run.policy) for run in runs] == [(slots, name) for slots in (12, 48) for name in names]
    assert [run.predictor for run in runs[:4]] == [None, "teller", None, "the future"]
    assert predictors["lookahead"].heard == []
    for bound in ("least_bytes", "layer_belady_bytes"):
        bounds = [getattr(run, bound) for run in runs]
        assert bounds[0] == bounds[3] > bounds[4] > 0
    assert all(run.least_bytes < run.layer_belady_bytes for run in runs)


def test_a_row_adds_up_and_its_table_has_every_figure() -> None:
    runs = list(bake_off(drawn_trace(), MACHINE, [24], ["lru", "oracle"], {}))
    rows = [json.loads(json.dumps(figures(run))) for run in runs]
    kinds = ("demanded", "prefetched_useful", "prefetched_late", "wasted")
    for row in rows:
        assert sum(row[f"{kind}_bytes_per_token"] for kind in kinds) == pytest.approx(row["bytes_per_token"])
        assert row["itl_p50_s"] <= row["itl_p95_s"] <= row["itl_p99_s"]
    for row, run in zip(rows, runs, strict=True):
        assert row["total_s"] == pytest.approx(3 * row["ttft_s"] + run.num_tokens * row["tpot_s"])
    assert rows[0]["recall_at_k"] is None and rows[1]["recall_at_k"] == 1.0
    lines = table(rows)
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "-" in lines[1].split() and "100.0%" in lines[2].split()
