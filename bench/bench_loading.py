"""What packing and loading take: ``python bench/bench_loading.py --folder DIR [--json OUT] [--case NAME] [--quick]``.

Makes a checkpoint of each case in DIR (2 to 3 GB each, one at a time, removed at the end), packs and loads it in
processes of their own, and measures by how much each grew and how fast packs were written, beside what the disk writes
when nothing is converted. ``--json`` writes the result and, beside it, its Markdown. ``--quick``: experts of a size
for a test. Exits with 1 when memory is not bounded as promised.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from duoserve.experts.rows import aligned_rows
from harness import as_module, module_env, result_file, write_result
from loading.models import CASES, Case, make_checkpoint
from loading.report import render, sizes_and_rates, verdicts
from machine import conditions, foreign_cpu

SHARD_BYTES, QUICK_SHARD_BYTES = 1 << 30, 1 << 20  # published shards have 2 to 5 GB
BLOCK_BYTES = 64 << 20
ROUNDS = 3
WAYS = {"direct": os.O_DIRECT, "cached": 0}


def measured(case: Case, folder: Path, quick: bool) -> dict[str, Any]:
    """Rounds of writing, packing and loading in turn; ``folder`` is empty before and after."""
    checkpoint, cache = folder / "checkpoint", folder / "cache"
    largest = make_checkpoint(case, checkpoint, QUICK_SHARD_BYTES if quick else SHARD_BYTES, quick)
    total = sum(file.stat().st_size for file in checkpoint.iterdir())
    rounds = []
    for _ in range(1 if quick else ROUNDS):
        packed = _worker("pack", checkpoint, cache, case.quantize)
        shutil.rmtree(cache)
        converted = _worker("convert", checkpoint, cache, case.quantize)
        writes = {name: written(folder / "written", packed["bytes"], flags) for name, flags in WAYS.items()}
        rounds.append({"pack": packed, "convert": converted, "write": writes})
    loaded = _worker("load", checkpoint, cache, case.quantize)
    shutil.rmtree(checkpoint)
    shutil.rmtree(cache, ignore_errors=True)
    return {
        "case": case.name,
        "model": f"{case.layers} of the layers of {case.model}",
        "checkpoint_bytes": total,
        "largest_shard_bytes": largest,
        "rounds": rounds,
        "load": loaded,
    }


def written(file: Path, nbytes: int, flags: int) -> float:
    """Bytes/s of a new file of whole blocks, until they are on the disk."""
    block = memoryview(aligned_rows(1, min(BLOCK_BYTES, nbytes))[0].random_().numpy())
    began = time.perf_counter()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | flags)
    try:
        for start in range(0, nbytes - len(block) + 1, len(block)):
            os.pwrite(descriptor, block, start)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - began
    size = file.stat().st_size
    file.unlink()
    return size / seconds


def _worker(work: str, checkpoint: Path, cache: Path, quantize: str | None) -> dict[str, Any]:
    command = [sys.executable, *as_module("loading.worker", work, str(checkpoint), str(cache))]
    if quantize is not None:
        command += ["--quantize", quantize]
    done = subprocess.run(command, env=module_env(), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="a folder that is not there yet, on the disk to test"
    )
    parser.add_argument("--json", type=result_file, help="the result; its Markdown goes beside it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this, or these")
    args = parser.parse_args()

    began = time.perf_counter()
    args.folder.mkdir(parents=True)
    result = conditions("bench_loading", args.quick, args.folder)
    result["idle"] = {"before": foreign_cpu(0.2 if args.quick else 5)}
    result["cases"] = []
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        result["cases"].append(measured(case, args.folder, args.quick))
        print(sizes_and_rates(result["cases"][-1:]), file=sys.stderr)
        result["idle"]["after"] = foreign_cpu(0.2 if args.quick else 5)
        result["verdicts"] = verdicts(result["cases"])
        result["seconds"] = time.perf_counter() - began
        if args.json:  # after each, so that a run that is stopped keeps what it has
            write_result(args.json, result)
            args.json.with_suffix(".md").write_text(render(result))
    args.folder.rmdir()
    print(render(result))
    missed = any(found["what"] == "memory" and not found["reached"] for found in result["verdicts"])
    sys.exit(missed and not args.quick)  # small experts are less than what any process takes


if __name__ == "__main__":
    main()
