"""The loading bench: its checkpoints load in every format, memory is a process's own, its verdicts are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench_loading import WAYS, written
from duoserve.experts.pack_format import PACK_FILE
from duoserve.experts.rows import aligned_rows
from duoserve.models.opened import opened
from harness import as_module, module_env
from loading import report as loading_report
from loading.models import CASES, make_checkpoint

GB = 10**9
SHARD = GB // 2


def case(packing: int, loading: int, seconds: float) -> dict:
    """A pack of 2 GB, on a disk that writes 1 GB/s past the page cache and 0.4 GB/s through it."""
    packed = {"seconds": seconds, "bytes": 2 * GB, "growth": packing}
    return {
        "case": "bf16",
        "model": "1 of the layers of a model",
        "checkpoint_bytes": 2 * GB,
        "largest_shard_bytes": SHARD,
        "rounds": [
            {
                "pack": packed,
                "convert": {"seconds": 2.0, "bytes": GB},
                "write": {"direct": 1.0 * GB, "cached": 0.4 * GB},
            }
        ],
        "load": {"seconds": 1.0, "bytes": 3 * GB, "growth": 3 * GB + loading},
    }


@pytest.mark.parametrize(
    ("packing", "loading", "seconds", "reached"),
    [
        (GB, GB, 4.0, [True, True, True, True]),
        (GB + 1, 0, 4.0, [False, True, True, True]),
        (0, GB + 1, 4.1, [True, False, False, True]),
        (0, 0, 10.1, [True, True, False, False]),
    ],
)
def test_verdicts(packing: int, loading: int, seconds: float, reached: list[bool]) -> None:
    found = loading_report.verdicts([case(packing, loading, seconds)])
    assert [verdict["figure"] for verdict in found] == ["packing", "loading", "direct", "cached"]
    assert [verdict["reached"] for verdict in found] == reached
    line = loading_report.sizes_and_rates([case(packing, loading, seconds)]).splitlines()[-1]
    assert "| 0.50 |" in line  # made by one thread
    assert ("| reached |" in line) is all(reached[:2]) and line.count("GB/s: reached") == sum(reached[2:])


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.name)
def test_every_checkpoint_is_one(made, tmp_path: Path) -> None:
    """An expert of it can be packed; its shards are as large as is said."""
    largest = make_checkpoint(made, tmp_path / "checkpoint", 1 << 20, small=True)
    assert largest == max(file.stat().st_size for file in (tmp_path / "checkpoint").glob("*.safetensors"))
    with opened(tmp_path / "checkpoint") as model:
        store = model.expert_store(model.config.dtype)
        store.read(model.experts[-1], aligned_rows(1, store.layout.slot_bytes)[0])
        assert str(store.layout.name).startswith({"AWQ": "int4", "GPTQ": "int4", "fp8": "fp8"}.get(made.name, ""))


def test_the_worker_counts_what_it_holds(tmp_path: Path) -> None:
    """A model that stays in memory is in its growth; that of a pack is far less than the pack."""
    make_checkpoint(CASES[1], tmp_path / "checkpoint", 16 << 20, small=True)
    found = {}
    for work in ("pack", "convert", "load"):
        words = as_module("loading.worker", work, str(tmp_path / "checkpoint"), str(tmp_path / work))
        done = subprocess.run([sys.executable, *words], env=module_env(), check=True, capture_output=True, text=True)
        found[work] = json.loads(done.stdout)
    assert found["pack"]["bytes"] == sum(file.stat().st_size for file in tmp_path.glob(f"pack/**/{PACK_FILE}"))
    assert found["pack"]["growth"] < found["pack"]["bytes"] / 2
    assert found["convert"]["bytes"] == found["pack"]["bytes"]
    assert found["load"]["growth"] > 0.9 * found["pack"]["bytes"]


@pytest.mark.parametrize("way", WAYS)
def test_writes_are_whole_and_leave_nothing(way: str, tmp_path: Path) -> None:
    assert written(tmp_path / "file", 3 << 20, WAYS[way]) > 0
    assert not list(tmp_path.iterdir())
