"""The tuner's search space, its search and what it prints; all without a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tune_kernels
from duoserve.kernels import configs
from duoserve.kernels.configs import HUGE, LARGE, MEDIUM, SMALL, GemmConfig, GemvConfig, gemm_config, gemv_config
from duoserve.kernels.weights import ExpertFormat
from gpu import tune_space, tune_trial
from gpu.moe_shapes import MoEShape
from tests.kernels.common import DEVICE

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
ARCHS = (80, 86, 89, 90, 100, 120)
FORMATS = [
    (ExpertFormat.FLOAT, 0),
    (ExpertFormat.FP8, 0),
    (ExpertFormat.INT4, 128),
    (ExpertFormat.INT8, 0),
    (ExpertFormat.BF12, 0),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("block_t", [SMALL, MEDIUM, LARGE, HUGE])
def test_every_row_of_the_space_can_run(arch: int, format: ExpertFormat, group: int, block_t: int) -> None:
    corner = tune_space.Corner(format, arch, block_t, 2048)
    rows = tune_space.gemm_rows(corner, group)
    present = gemm_config(torch.bfloat16, arch, block_t, True, format, group)
    alone = replace(present, ctas_per_sm=1)  # the table may ask for more CTAs than this GPU holds at a time
    assert corner.gemm_fault(alone) is None and alone in rows and len(rows) > 10
    stored = {ExpertFormat.FLOAT: 2, ExpertFormat.INT4: 0.5, ExpertFormat.BF12: 1.5}.get(format, 1)
    shared = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[arch] * 1024  # that one CTA may have
    for row in rows:
        tiles = row.num_stages * row.block_k * (row.block_n * stored + row.block_t * 2)
        assert tiles <= shared and tiles * row.ctas_per_sm <= shared + 1024
        assert row.block_n >= 64 and 16 <= row.block_t <= block_t  # what tensor cores take at least
        assert row.block_k >= 16 and row.num_warps in (4, 8) and row.num_stages >= 2
        assert format not in (ExpertFormat.INT4, ExpertFormat.FP8) or row.block_k == present.block_k
        assert format is not ExpertFormat.BF12 or (row.block_k == present.block_k and not row.tma)
        assert not row.tma or arch in (90, 100)
        sums = row.block_n * row.block_t // (32 * row.num_warps)
        sets = 2 if format in (ExpertFormat.INT4, ExpertFormat.FP8) else 1  # sums, and scaled sums
        assert row.ctas_per_sm * row.num_warps * 32 * sums * sets <= 65536


@pytest.mark.parametrize("inner", [2048, 768, 1408, 14336])
def test_every_matrix_vector_row_can_run(inner: int) -> None:
    corner = tune_space.Corner(ExpertFormat.FLOAT, 90, SMALL, inner)
    rows = tune_space.gemv_rows(corner)
    assert gemv_config(torch.bfloat16, 90, inner) in rows
    for row in rows:
        assert row.block_n % 2 == 0 and inner % row.block_k == 0
        assert 4 <= row.block_n * row.block_k // (32 * row.num_warps) <= 32


def test_neighbours_differ_in_one_field_and_are_made_to_fit() -> None:
    corner = tune_space.Corner(ExpertFormat.FLOAT, 90, SMALL, 2048)
    present = gemm_config(torch.bfloat16, 90, SMALL)
    around = list(corner.gemm_neighbours(present))
    assert len(around) > 8
    for row in around:
        changed = {name for name in corner.gemm_space() if getattr(row, name) != getattr(present, name)}
        assert changed and len(changed - {"ctas_per_sm", "num_stages"}) <= 1, changed
        assert corner.gemm_fault(row) is None
    assert replace(present, block_n=128, ctas_per_sm=3) in around  # 4 of them would not fit
    assert "shared memory" in str(corner.gemm_fault(replace(present, num_stages=90)))


def test_a_row_is_printed_as_the_table_has_it() -> None:
    names = {"GemmConfig": GemmConfig, "GemvConfig": GemvConfig}
    for row in (
        gemm_config(torch.bfloat16, 90, LARGE),
        replace(gemm_config(torch.float16, 80, SMALL), group_t=4),
        gemv_config(torch.bfloat16, 90, 768),
    ):
        text = tune_space.row_text(row, "why")
        assert eval(text, names) == replace(row, reason="why"), text
    assert tune_space.row_text(configs._SM90[SMALL], "x") == 'GemmConfig(64, 16, 64, 4, 4, 4, "x", tma=True)'


def test_the_search_climbs_down_to_the_best_row() -> None:
    corner = tune_space.Corner(ExpertFormat.FLOAT, 90, SMALL, 2048)
    present = gemm_config(torch.bfloat16, 90, SMALL)

    def share(row: GemmConfig) -> float:
        if row.num_warps == 8:
            return math.inf
        return 1.0 - 0.1 * (row.block_n == 128) - 0.1 * (row.block_n == 128 and row.ctas_per_sm == 2)

    found = tune_kernels.descend(present, corner.gemm_neighbours, share, lambda: False)
    assert (found.best.block_n, found.best.ctas_per_sm, found.finished) == (128, 2, True)
    assert found.share == pytest.approx(0.8) and found.present == present
    stopped = tune_kernels.descend(present, corner.gemm_neighbours, share, lambda: True)
    assert stopped.best == present and not stopped.finished and stopped.tried == 0
    text = tune_kernels.entry("both", corner, found, 50.0)["text"]
    assert "40 us, present row 50 us (1.25x;" in text and "\nSMALL: GemmConfig(128, 16," in text


class Still:
    """Runs its first step once."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.num_steps = len(steps)
        steps[0]()


@pytest.fixture
def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials on a CPU, of made-up times: 4 us for the present row, 3 us for any other."""
    monkeypatch.setattr(tune_trial, "Replay", Still)
    monkeypatch.setattr(tune_trial, "times_us", lambda them: {n: [4.0 if n == "present" else 3.0] for n in them})
    monkeypatch.setattr(tune_trial, "gpu_facts", lambda: {"l2_bytes": 1})
    monkeypatch.setattr(tune_trial, "POOL_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton's interpreter stands in for a GPU here")
@pytest.mark.usefixtures("small_trials")
@pytest.mark.parametrize(("format", "ops"), [("bf16", (*tune_kernels.GEMMS, *tune_kernels.GEMVS)), ("int4", ("both",))])
def test_a_row_is_tried_and_one_that_computes_nothing_is_none(
    monkeypatch: pytest.MonkeyPatch, format: str, ops: tuple[str, ...]
) -> None:
    trial = tune_trial.Trial(MoEShape("any", 128, 128, 4, 2), 3, format, "cpu")
    shares = {op: trial.share_of(op) for op in ops}
    for op, share in shares.items():
        present = trial.present(op)
        assert share(replace(present, num_warps=8)) == 0.75 and trial.times[op] == [4.0, 4.0]
    for name in ("moe_up", "moe_down", "moe_gemv_up", "moe_gemv_down"):
        monkeypatch.setattr(tune_trial, name, lambda *operands, **options: None)
    assert [share(trial.present(op)) for op, share in shares.items()] == [math.inf] * len(ops)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton's interpreter stands in for a GPU here")
@pytest.mark.usefixtures("small_trials")
def test_a_row_that_fails_halfway_spoils_none_of_the_next_kernels_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tune_trial.Trial(MoEShape("any", 128, 128, 4, 2), 3, "bf16", "cpu")
    up, broken = tune_trial.moe_up, replace(trial.present("moe_up"), num_warps=8)

    def moe_up(*operands: Any, config: GemmConfig | None = None) -> None:
        if config == broken:
            raise RuntimeError("out of shared memory")
        up(*operands, config=config)

    monkeypatch.setattr(tune_trial, "moe_up", moe_up)
    before = {op: trial.share_of(op) for op in ("moe_down", "moe_gemv_down")}
    assert trial.share_of("moe_up")(broken) == math.inf
    behind = {op: trial.share_of(op) for op in ("moe_down", "moe_gemv_down")}
    for op, share in [*before.items(), *behind.items()]:
        assert share(replace(trial.present(op), num_warps=8)) == 0.75


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton's interpreter stands in for a GPU here")
@pytest.mark.usefixtures("small_trials")
def test_a_present_row_that_computes_no_numbers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tune_trial.Trial(MoEShape("any", 128, 128, 4, 2), 3, "bf16", "cpu")
    monkeypatch.setattr(tune_trial, "moe_down", lambda *operands: None)
    with pytest.raises(FloatingPointError, match="the present row of moe_down"):
        trial.share_of("moe_down")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_tuner_says_that_it_needs_a_gpu() -> None:
    command = [sys.executable, str(BENCH / "tune_kernels.py"), "--formats", "int4", "--classes", "16"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing was measured" in done.stdout and "int4, sm_90, SMALL: " in done.stdout
