"""Which parts the serving bench runs, and in which order: a run may be cut short."""

from __future__ import annotations

import pytest

from bench_serve import all_parts
from duoserve.launching.launch import Launch
from duoserve.launching.recorded import RECORD_AFTER
from duoserve.planning.model_cards import find_model
from serve.cells import EVENT, GRAPH, Cell, cells
from serve.models import MODELS
from serve.report import rows
from serve.run import Limits
from tests.bench.test_bench_serve import part


def test_what_most_promises_are_about_comes_first() -> None:
    parts = all_parts(list(MODELS))
    first = parts[:12]
    assert sum("cell" not in part for part in first) == 2
    for model in list(MODELS)[:2]:
        own = [Cell(**part["cell"]) for part in first if part["model"] == model and "cell" in part]
        assert {EVENT, GRAPH} < {cell.mode for cell in own}
        assert {"lru", "resident", "on-demand"} == {cell.policy for cell in own}


def test_every_part_is_there_once() -> None:
    names = [part["name"] for part in all_parts(list(MODELS))]
    every = [cell.name for stage in cells() for cell in stage]
    assert len(set(names)) == len(names) == len(every) + len(MODELS) and set(every) < set(names)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_one_that_plans_know_by_that_name(name: str) -> None:
    wired, known = MODELS[name].wired(), find_model(name)
    assert wired.config == known.config
    assert wired.dense_bytes == known.family.dense_bytes(known.config, known.config.dtype)


def test_every_model_has_the_positions_that_its_cells_ask_for() -> None:
    positions = {name: model.wired().config.num_positions for name, model in MODELS.items()}
    asked = [(cell.model, cell.prompt + Limits().most + 1) for stage in cells() for cell in stage]
    assert [model for model, tokens in asked if tokens > positions[model]] == []


def test_a_warm_up_goes_on_until_a_step_was_recorded_and_replayed_and_a_measurement_for_some_more() -> None:
    limits = Limits()
    assert limits.to_warm_up().of(Launch.GRAPH).least > RECORD_AFTER + 1
    assert limits.of(Launch.EVENT).least >= 16
    assert limits.of(Launch.MODEL).least == limits.least < 16  # whose steps may take half a second each


def test_no_stall_is_claimed_for_steps_that_wait_in_their_kernels() -> None:
    shown = [rows({"parts": [part(launch=launch, prompt=128)]}) for launch in (EVENT, GRAPH)]
    assert "50% / 80%" in shown[0]
    assert "50% / -" in shown[1]
