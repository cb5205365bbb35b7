"""Made-up models: rows of every format, few layers of any family, and a watch whose time does not count."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duoserve.experts.layout import ExpertId
from duoserve.experts.rows import aligned_rows
from duoserve.kernels.reference_dequant import dense
from duoserve.planning import made_up
from duoserve.planning.formats import FORMATS, layout_in
from duoserve.planning.made_up import MadeUpStore, few_layers, running, staged
from duoserve.planning.model_cards import MODEL_CARDS, find_model
from duoserve.planning.rehearsal import timed_passes
from duoserve.scheduling.policies import POLICIES

BARD = find_model("bard")
LAYOUT = layout_in(BARD.config, None, BARD.config.dtype)


@pytest.mark.parametrize("name", MODEL_CARDS)
def test_few_layers_of_every_family_all_have_experts(name: str) -> None:
    model = find_model(name)
    few = few_layers(model.config, 2)
    assert (few.num_layers, few.moe_layers) == (2, (0, 1))
    names = model.family.dense_needs(few)
    assert any(".layers.1." in name for name in names) and not any(".layers.2." in name for name in names)


def test_few_layers_keep_the_windows_of_those_they_stand_for() -> None:
    config = find_model("gpt-oss-20b").config
    assert few_layers(config, 2).blocks.attention.windows == config.blocks.attention.windows[:2]


@pytest.mark.parametrize("form", FORMATS)
def test_a_made_up_expert_can_be_computed_in_every_format(form: str, tmp_path: Path) -> None:
    layout = layout_in(BARD.config, form, BARD.config.dtype)
    with staged(BARD.family, few_layers(BARD.config, 2), layout, tmp_path) as stage:
        for tier in ("disk", "ram"):
            with running(stage, POLICIES["lru"], 6, tier, 64) as run:
                passes = list(timed_passes(run, 8, 3))
    assert len(passes) == 4


@pytest.mark.parametrize("form", [None, "int8", "int4", "fp8"])
def test_float16_holds_what_wide_layers_make(form: str | None, tmp_path: Path) -> None:
    """Of layers as wide as DeepSeek-V2-Lite's: with weights that are as large in every matrix their sum overflows."""
    model = find_model("deepseek-v2-lite")
    blocks = model.config.blocks
    moe = replace(blocks.moe, router=replace(blocks.moe.router, num_experts=2, top_k=2))
    changed = replace(model.config, dtype=torch.float16, vocab_size=128, blocks=replace(blocks, moe=moe))
    config = few_layers(changed, 4)
    with (
        staged(model.family, config, layout_in(config, form, config.dtype), tmp_path) as stage,
        running(stage, POLICIES["resident"], 8, "disk", 32) as run,
    ):
        assert len(list(timed_passes(run, 8, 2))) == 3


@pytest.mark.parametrize(
    ("name", "form"), [("bard", "bf16"), ("bard", "int8"), ("bard", "int4"), ("bard", "fp8"), ("gpt-oss-20b", None)]
)
def test_weights_are_about_one_over_their_number(name: str, form: str | None) -> None:
    """MXFP4's scales are powers of two."""
    config = find_model(name).config
    layout = layout_in(config, form, config.dtype)
    rows = aligned_rows(1, layout.slot_bytes)
    MadeUpStore(layout).read(ExpertId(0, 0), rows[0])
    for matrix in (layout.weights(rows).w13, layout.weights(rows).w2):
        w_ND = dense(matrix, 0, slice(0, 8)).float()
        assert w_ND.min() == w_ND.max()
        assert 0.5 < float(w_ND.max()) * matrix.inner < 1.01


def test_every_expert_is_the_same_row() -> None:
    store, rows = MadeUpStore(LAYOUT), aligned_rows(2, LAYOUT.slot_bytes)
    for row, expert in zip(rows, (ExpertId(0, 0), ExpertId(1, 7)), strict=True):
        store.read(expert, row)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(LAYOUT.weights(rows).w13.data_SNB, torch.full((2, 512, 256), 1 / 256, dtype=torch.bfloat16))


def test_steps_ask_for_any_number_of_missing_experts_and_prompts_for_many(tmp_path: Path) -> None:
    with (
        staged(BARD.family, few_layers(BARD.config, 3), LAYOUT, tmp_path) as stage,
        running(stage, POLICIES["lru"], 9, "ram", 128) as run,
    ):
        first, *steps = timed_passes(run, 64, 60)
    missing = [count for step in steps for count in step.notes.missing]
    assert {0, 1, 2} == set(missing)
    assert all(missing.count(count) > 0.2 * len(missing) for count in (0, 1, 2))
    assert first.copies == pytest.approx(24, abs=2)
    assert all(len(step.notes.asked_s) == 3 for step in steps)


def test_what_the_watch_takes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: random.Random, *ends: int) -> int:
        time.sleep(0.3)
        return 1

    monkeypatch.setattr(made_up.random.Random, "randint", slow)
    with (
        staged(BARD.family, few_layers(BARD.config, 3), LAYOUT, tmp_path) as stage,
        running(stage, POLICIES["lru"], 9, "ram", 64) as run,
    ):
        _, *steps = timed_passes(run, 8, 3)
    assert min(step.notes.away_s for step in steps) > 0.9
    # On a busy machine a step may take long, but hardly each of them; what the watch takes is the same in all.
    assert min(step.seconds for step in steps) < 0.5
    assert min(step.notes.asked_s[-1] - step.notes.asked_s[0] for step in steps) < 0.5
