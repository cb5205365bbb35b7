"""One checkpoint packed or loaded in a process of its own: ``python bench/loading_worker.py pack|load FOLDER CACHE``.

Prints JSON: the seconds, the bytes of what came of it, and by how much the process grew at most.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from machine import memory_bytes, reset_peak_memory

from duoserve import MoEModel
from duoserve.experts.packing import pack_path, write_pack
from duoserve.models.opened import opened


def pack(folder: Path, cache: Path, quantize: str | None) -> int:
    """What ``duoserve pack`` does; bytes of the pack, none of which stay in memory."""
    with opened(folder) as model:
        store = model.expert_store(model.config.dtype) if quantize is None else model.quantizing_store(quantize)
        write_pack(store, model.experts, pack_path(model.checkpoint, store.layout, cache), "of a bench")
        return len(model.experts) * store.layout.slot_bytes


def load(folder: Path, cache: Path, quantize: str | None) -> int:
    """Every expert into a slot; bytes of the memory that was planned for the model."""
    with MoEModel.from_pretrained(folder, max_context=128, quantize=quantize, cache_dir=cache) as model:
        return model.memory.total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["pack", "load"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--quantize", choices=["int8", "int4"])
    args = parser.parse_args()

    reset_peak_memory()
    before, began = memory_bytes()["rss"], time.perf_counter()
    nbytes = {"pack": pack, "load": load}[args.work](args.folder, args.cache, args.quantize)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "growth": memory_bytes()["peak_rss"] - before}))


if __name__ == "__main__":
    main()
