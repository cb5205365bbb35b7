"""The link between host and GPU: bandwidth by size, pinned and pageable, each way, and reads by a kernel.

    python bench/bench_copy.py [--json OUT] [--tiny]

These are the ceilings that every other figure is held against. ``--tiny`` copies small pieces within the host's memory:
it checks the bench and measures no link. The result file is written after each way, so a run that is cut off keeps
what it has. Without a CUDA GPU and without ``--tiny`` it says so and exits with 3; a copy that changes bytes, or a way
that fails, makes it exit with 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gpu.ceilings import gpu_facts
from gpu.copy_machines import GpuCopies, HostCopies
from gpu.copy_report import render
from gpu.copy_table import SIZES, TINY_SIZES, measure, targets
from harness import result_file, write_result
from machine import conditions

Result = dict[str, Any]


def run(tiny: bool, out: Path | None) -> Result:
    """The whole result; ``out`` has what there is of it after each way, so a run that is cut off leaves that."""
    began = time.perf_counter()
    result = conditions("bench_copy", tiny)
    result["gpu"] = None if tiny else gpu_facts()

    def save(measured: Result) -> None:
        result.update(measured)
        result["targets"] = [] if tiny else [target.to_dict() for target in targets(result)]
        result["seconds"] = time.perf_counter() - began
        if out:
            write_result(out, result)

    if tiny:
        measure(HostCopies(), TINY_SIZES, save)
    else:
        measure(GpuCopies(), SIZES, save)
    return result


def failed(result: Result) -> bool:
    """Whether a way could not be measured, or changed a byte."""
    unmeasured = any(cell["error"] for cell in result["cells"])
    return unmeasured or any(check["passed"] is not True for check in result["checks"])


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file, help="write all figures to this file")
    parser.add_argument("--tiny", action="store_true", help="small copies within the host: a check of the bench")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("bench_copy: no CUDA GPU: nothing was measured")
        return 3
    result = run(args.tiny, args.json)
    print(render(result))
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
