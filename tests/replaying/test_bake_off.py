"""Policies side by side."""

from __future__ import annotations

import json

import pytest

from duoserve.replaying.bake_off import bake_off, rows
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from tests.scheduling.fortune import Teller, certain
from tests.traces.drawn import drawn_trace

MACHINE = Machine(Hardware("even", 1e10, 1e11, 1e14, 0.0, 1e-4), LayerSizes("small", 1_000_000, 8, 1_000_000, 64))


def test_rows_come_by_slots_and_policy_and_a_predictor_goes_to_its_own_kind() -> None:
    predictors = {"lookahead": Teller(lambda layer: certain(16, [1, 2]))}
    names = ["lru", "lookahead", "duoserve", "oracle"]
    runs = list(bake_off(drawn_trace(), MACHINE, [12, 48], names, predictors))
    assert [(run.num_slots, run.policy) for run in runs] == [(slots, name) for slots in (12, 48) for name in names]
    assert [run.predictor for run in runs[:4]] == [None, "teller", None, "the future"]
    assert predictors["lookahead"].heard == []
    found = list(rows(runs, drawn_trace(), MACHINE))
    for bound in ("least_bytes_per_token", "layer_belady_bytes_per_token"):
        bounds = [row[bound] for row in found]
        assert bounds[0] == bounds[3] > bounds[4] > 0
    assert all(row["least_bytes_per_token"] < row["layer_belady_bytes_per_token"] for row in found)


def test_a_row_adds_up() -> None:
    runs = list(bake_off(drawn_trace(), MACHINE, [24], ["lru", "oracle"], {}))
    found = [json.loads(json.dumps(row)) for row in rows(runs, drawn_trace(), MACHINE)]
    kinds = ("demanded", "prefetched_useful", "prefetched_late", "wasted")
    for row in found:
        assert sum(row[f"{kind}_bytes_per_token"] for kind in kinds) == pytest.approx(row["bytes_per_token"])
        assert row["itl_p50_s"] <= row["itl_p95_s"] <= row["itl_p99_s"]
    for row, run in zip(found, runs, strict=True):
        assert row["total_s"] == pytest.approx(3 * row["ttft_s"] + run.num_tokens * row["tpot_s"])
    assert found[0]["recall_at_k"] is None and found[1]["recall_at_k"] == 1.0
