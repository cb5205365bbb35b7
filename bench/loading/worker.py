"""One checkpoint packed, converted or loaded: ``python -m loading.worker pack|convert|load FOLDER CACHE``.

``convert`` is packing without the disk, on one thread, for some seconds: what a core can give.

In a process of its own. Prints JSON: the seconds, the bytes of what came of it, and by how much the process grew.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from duoserve import MoEModel
from duoserve.experts.pack_folder import pack_path
from duoserve.experts.packing import write_pack
from duoserve.experts.rows import aligned_rows
from duoserve.models.opened import opened
from machine import memory_bytes, reset_peak_memory

CONVERT_SECONDS = 2.0


def pack(folder: Path, cache: Path, quantize: str | None) -> int:
    """What ``duoserve pack`` does; bytes of the pack, none of which stay in memory."""
    with opened(folder) as model:
        store = model.expert_store(model.config.dtype, quantize)
        write_pack(store, model.experts, pack_path(model.checkpoint, store.layout, cache), "of a bench")
        return len(model.experts) * store.layout.slot_bytes


def convert(folder: Path, cache: Path, quantize: str | None) -> int:
    """Makes parts of rows and leaves them; bytes of them."""
    torch.set_num_threads(1)
    nbytes, until = 0, time.perf_counter() + CONVERT_SECONDS
    with opened(folder) as model:
        store = model.expert_store(model.config.dtype, quantize)
        largest = max(part.stop - part.start for part in store.parts(model.experts[0]))
        bytes_B = aligned_rows(1, largest)[0]
        for expert in model.experts:
            for part in store.parts(expert):
                store.read_part(expert, part, bytes_B[: part.stop - part.start])
                nbytes += part.stop - part.start
            if time.perf_counter() > until:
                break
    return nbytes


def load(folder: Path, cache: Path, quantize: str | None) -> int:
    """Every expert into a slot; bytes of the memory that was planned for the model."""
    with MoEModel.from_pretrained(folder, max_context=128, quantize=quantize, cache_dir=cache) as model:
        return model.memory.total_bytes


WORKS = {"pack": pack, "convert": convert, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=list(WORKS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--quantize", choices=["int8", "int4"])
    args = parser.parse_args()

    reset_peak_memory()
    before, began = memory_bytes()["rss"], time.perf_counter()
    nbytes = WORKS[args.work](args.folder, args.cache, args.quantize)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "growth": memory_bytes()["peak_rss"] - before}))


if __name__ == "__main__":
    main()
