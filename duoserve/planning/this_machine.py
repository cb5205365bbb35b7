"""The machine that this runs on, measured once; the rates are kept in the cache folder.

What is free of its memory is asked anew each time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from duoserve.errors import ConfigError
from duoserve.experts.device import CPU, free_bytes, resolve
from duoserve.experts.packing import cache_folder
from duoserve.experts.strict_json import read_object
from duoserve.planning.measuring import RATES, measure
from duoserve.scheduling.hardware import Hardware

THIS = "this"
FILE = "machine.json"


def this_machine(cache_dir: str | Path | None = None, *, anew: bool = False) -> Hardware:
    """The card; measured now if it has not been, or if ``anew``. ConfigError for a malformed file."""
    device, path = resolve("auto"), cache_folder(cache_dir) / FILE
    about = {"device": _name(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    kept = read_object(path, 1 << 16) if path.is_file() and not anew else {}
    if not kept.keys() >= set(RATES) or any(kept.get(key) != value for key, value in about.items()):
        kept = about | measure(device, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
    if not all(isinstance(kept.get(rate), float) and kept[rate] > 0 for rate in RATES):
        raise ConfigError(f"{path}: not every one of {', '.join(RATES)} is a number above 0: delete the file")
    on_cpu = device.type == "cpu"
    return Hardware(
        THIS,
        **{rate: kept[rate] for rate in RATES},
        host_computes=on_cpu,
        memory_bytes=free_bytes(device),
        host_bytes=0 if on_cpu else free_bytes(CPU),
    )


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device)
