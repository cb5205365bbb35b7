"""The machine that this runs on. It is measured once: rates and rehearsals of models are kept in the cache folder.

Only its free memory is looked up each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from duoserve.errors import CheckpointError, ConfigError
from duoserve.experts.device import CPU, free_bytes, resolve_device
from duoserve.experts.host_cores import cpu_model, usable_cores
from duoserve.experts.layout import ExpertLayout
from duoserve.experts.pack_folder import cache_folder
from duoserve.files.positional import is_file
from duoserve.files.strict_json import read_object
from duoserve.files.whole import refused_as, write_whole
from duoserve.models.described import DescribedModel
from duoserve.planning.measuring import RATES, measure
from duoserve.planning.rehearsal import Rehearsal, rehearse
from duoserve.replaying.hardware import Hardware

THIS = "this"
FILE = "machine.json"
_MAX_BYTES = 1 << 16


def this_machine(cache_dir: str | Path | None = None, *, anew: bool = False) -> Hardware:
    """The machine's rates and memory; it is measured now if it has not been yet, or if ``anew``.

    Raises ConfigError for a malformed file, or a cache folder that cannot be written, and CheckpointError as
    ``cache_folder`` does.
    """
    device, path = resolve_device("auto"), cache_folder(cache_dir) / FILE
    about = _about(device)
    kept = _read(path) if is_file(path) and not anew else {}
    if not kept.keys() >= set(RATES) or any(kept.get(key) != value for key, value in about.items()):
        with _writing_to(path.parent):
            kept = about | measure(device, path.parent)
            write_whole(path, f"{json.dumps(kept, indent=1)}\n".encode())
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


def this_rehearsal(
    model: DescribedModel, layout: ExpertLayout, prompt: int, cache_dir: str | Path | None = None, *, anew: bool = False
) -> Rehearsal | None:
    """A rehearsal of the model with prompts of ``prompt`` tokens; it is made now if there is none yet, or if ``anew``.

    None on a GPU, and if ``rehearse`` gives None. Errors as in ``this_machine``.
    """
    device, folder = resolve_device("auto"), cache_folder(cache_dir)
    if device.type != "cpu":
        return None
    about = _about(device) | {"model": repr(model.config), "experts": layout.name, "prompt": prompt}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = folder / f"rehearsal-{key}.json"
    if is_file(path) and not anew:
        try:
            return Rehearsal.from_dict(_read(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: no rehearsal ({error}): delete the file") from error
    with _writing_to(folder):
        found = rehearse(model, layout, prompt, folder)
        if found is not None:
            write_whole(path, f"{json.dumps(found.to_dict())}\n".encode())
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, _MAX_BYTES)
    except CheckpointError as error:
        raise ConfigError(f"{path}: no JSON object of at most {_MAX_BYTES} bytes: delete the file") from error


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Makes ``folder``, whose disk is measured, and which keeps the figures; raises ConfigError if it cannot."""
    remedy = "; choose another cache folder with DUOSERVE_CACHE, or name a machine with --hardware"
    with refused_as(ConfigError, f"{folder}: this machine cannot be measured there", remedy):
        folder.mkdir(parents=True, exist_ok=True)
        yield


def _about(device: torch.device) -> dict[str, str | int]:
    return {"device": _name(device), "torch": torch.__version__, "threads": torch.get_num_threads()}


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {cpu_model()}, {usable_cores():g} cores, {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device)
