"""The tuner: better rows for ``duoserve/kernels/configs.py``, found on the GPU at hand, never at run time.

    python bench/tune_kernels.py [--formats bf16 int4 fp8] [--classes 16 64 128 256] [--seconds 400] [--json OUT]

From the table's present row it goes to the best of the rows that differ in one field, and on from there, as long as
that gains anything. A row counts only if it computes what the present one computes. For each (op, format, class) it
prints the best row as the table would hold it, with its time beside the present row's; a person judges and pastes.
``moe_up`` and ``moe_down`` share their rows in the table, so ``both`` is tuned as well as each. Without a CUDA GPU it
prints the size of the search space, says that nothing was measured, and exits with 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Generic

import torch

from duoserve.kernels.configs import HUGE, LARGE, MEDIUM, SMALL
from duoserve.kernels.weights import ExpertFormat
from gpu.moe_shapes import INT4_GROUP, MIXTRAL, QWEN3, MoEShape
from gpu.tune_space import Config, Corner, gemm_rows, gemv_rows, row_text
from harness import result_file, write_result

FORMATS = {"bf16": ExpertFormat.FLOAT, "fp8": ExpertFormat.FP8, "int4": ExpertFormat.INT4}
NAMES = {SMALL: "SMALL", MEDIUM: "MEDIUM", LARGE: "LARGE", HUGE: "HUGE"}
# What stands for each shape class: a layer and its tokens.
STANDS_FOR: dict[int, tuple[MoEShape, int]] = {
    SMALL: (QWEN3, 4),
    MEDIUM: (QWEN3, 512),
    LARGE: (QWEN3, 2048),
    HUGE: (MIXTRAL, 8192),
}
GEMMS, GEMVS = ("both", "moe_up", "moe_down"), ("moe_gemv_up", "moe_gemv_down")
GAIN = 0.99  # of the best row's time: less is noise
SECONDS = 400


@dataclass
class Found(Generic[Config]):
    """The outcome of one search: ``share`` is the best row's time over the present row's, in pairs of rounds."""

    present: Config
    best: Config
    share: float = 1.0
    tried: int = 0
    finished: bool = False


def descend(
    present: Config,
    around: Callable[[Config], Iterable[Config]],
    share_of: Callable[[Config], float],
    time_is_up: Callable[[], bool],
) -> Found[Config]:
    """From ``present`` to the best neighbour, and on; ``share_of`` a row is inf when it does not do."""
    found, seen = Found(present, present), {present}
    while True:
        start = found.best
        for row in around(start):
            if row in seen:
                continue
            if time_is_up():
                return found
            seen.add(row)
            found.tried += 1
            share = share_of(row)
            if share < GAIN * found.share:
                found.best, found.share = row, share
        if found.best == start:
            found.finished = True
            return found


def ops_of(format: str, block_t: int) -> tuple[str, ...]:
    """What is tuned for a class; one token's kernels take bf16 only."""
    return (*GEMMS, *GEMVS) if format == "bf16" and block_t == SMALL else GEMMS


def tune(format: str, block_t: int, seconds: float) -> list[dict[str, Any]]:
    """All ops of one format and class, on the GPU, each in its share of ``seconds``; prints each row when found."""
    from gpu.tune_trial import Trial  # noqa: PLC0415 (imports triton, which a machine without a GPU may lack)

    end = time.perf_counter() + seconds
    trial, results, ops = Trial(*STANDS_FOR[block_t], format), [], ops_of(format, block_t)
    for number, op in enumerate(ops):
        deadline = _share_of_time(end, len(ops) - number)
        corner = Corner(FORMATS[format], trial.arch, block_t, trial.inner(op))
        around = corner.gemv_neighbours if op in GEMVS else corner.gemm_neighbours
        found = descend(trial.present(op), around, trial.share_of(op), lambda end=deadline: time.perf_counter() > end)
        results.append(entry(op, corner, found, statistics.median(trial.times[op])))
        print(results[-1]["text"], flush=True)
    return results


def entry(op: str, corner: Corner, found: Found[Any], present_us: float) -> dict[str, Any]:
    """One outcome, for the result file; ``text`` is for the reader."""
    shape, tokens = STANDS_FOR[corner.block_t]
    layer = f"{shape.name}, {1 if op in GEMVS else tokens} tokens"
    best_us = found.share * present_us
    kept = "the present row stays" if found.best == found.present else f"{1 / found.share:.2f}x"
    ended = "" if found.finished else "; the time was up"
    row = row_text(found.best, f"tuned on {layer}: {best_us:.4g} us, was {present_us:.4g}")
    text = (
        f"# {op}, {corner.format.value}, sm_{corner.arch}, {layer}: {best_us:.4g} us, present row {present_us:.4g} us "
        f"({kept}; {found.tried} rows tried{ended})\n"
        f"{NAMES[corner.block_t]}: {row},"
    )
    rows = {"present": asdict(found.present), "best": asdict(found.best)}
    times = {"present_us": present_us, "best_us": best_us, "tried": found.tried, "finished": found.finished}
    where = {"op": op, "format": corner.format.value, "arch": corner.arch, "class": corner.block_t}
    return where | rows | times | {"text": text}


def space_sizes(formats: Iterable[str], classes: Iterable[int], arch: int = 90) -> str:
    """What there is to search, a line each."""
    lines = []
    for format in formats:
        for block_t in classes:
            group = INT4_GROUP if format == "int4" else 0
            rows = gemm_rows(Corner(FORMATS[format], arch, block_t, QWEN3.hidden), group)
            lines.append(f"{format}, sm_{arch}, {NAMES[block_t]}: {len(rows)} rows")
    vectors = gemv_rows(Corner(ExpertFormat.FLOAT, arch, SMALL, QWEN3.hidden))
    return "\n".join([*lines, f"matrix-vector, inner dimension {QWEN3.hidden}: {len(vectors)} rows"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="of the weights")
    parser.add_argument("--classes", nargs="+", type=int, choices=NAMES, default=list(NAMES), help="shape classes (BT)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of searching, all in all (default %(default)s)")
    parser.add_argument("--json", type=result_file, help="write all outcomes to this file, after every class")
    return parser.parse_args()


def main() -> int:
    """Tunes class by class; 1 when a class failed."""
    args = arguments()
    if not torch.cuda.is_available():
        print("No CUDA GPU was found: nothing was measured. The search space:")
        print(space_sizes(args.formats, args.classes))
        return 0
    end, results, failed = time.perf_counter() + args.seconds, [], False
    searches = [(format, block_t) for format in args.formats for block_t in args.classes]
    for number, (format, block_t) in enumerate(searches):
        try:
            deadline = _share_of_time(end, len(searches) - number)
            results += tune(format, block_t, deadline - time.perf_counter())
        except Exception as error:
            failed = True
            print(f"# {format}, {NAMES[block_t]}: failed: {type(error).__name__}: {error}", flush=True)
        if args.json:
            write_result(args.json, results)
    return int(failed)


def _share_of_time(end: float, takers: int) -> float:
    """When the first of ``takers`` must stop, so that all get the same time until ``end``."""
    now = time.perf_counter()
    return now + max(0.0, end - now) / takers


if __name__ == "__main__":
    sys.exit(main())
