"""Which files a checkpoint folder has: its tensors are in one ``model.safetensors``, or in the shards of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duoserve.errors import CheckpointError
from duoserve.experts.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS
from duoserve.files.positional import is_there
from duoserve.files.strict_json import read_object

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_CONVERT = "convert them once, where you trust them, with model.save_pretrained(folder, safe_serialization=True)"


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard file name by the index; None when the folder has a single ``model.safetensors`` instead.

    CheckpointError if neither is there, or the index is malformed or names anything but files of this folder.
    """
    if is_there(folder / SINGLE_FILE):
        return None
    index = folder / INDEX_FILE
    if not is_there(index):
        raise CheckpointError(_why_no_weights(folder))
    return _checked(read_object(index, MAX_HEADER_BYTES).get("weight_map"), index)


def has_weights(folder: Path) -> bool:
    """Whether every file of weights is there; CheckpointError if the index is malformed."""
    if not any(is_there(folder / name) for name in (SINGLE_FILE, INDEX_FILE)):
        return False
    listed = weight_map(folder)
    files = {SINGLE_FILE} if listed is None else set(listed.values())
    return all(is_there(folder / file) for file in files)


def _why_no_weights(folder: Path) -> str:
    missing = f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}"
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if weights:
        return (
            f"{missing}, only {', '.join(weights[:3])}: one file with all weights must be called {SINGLE_FILE}, and "
            f"several need {INDEX_FILE}, which says what is in each"
        )
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        return f"{missing}: no weights are there; duoserve reads safetensors, which save_pretrained writes"
    return f"{missing}, only {', '.join(pickles[:3])}: pickled weights can run code and are never opened; {_CONVERT}"


def _checked(mapping: Any, index: Path) -> dict[str, str]:
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names; download the file again")
    if len(mapping) > MAX_TENSORS:
        raise CheckpointError(f"{index}: weight_map lists {len(mapping)} tensors, {MAX_TENSORS} are allowed")
    for tensor, file in mapping.items():
        _check_file_name(file, tensor, index)
    return mapping


def _check_file_name(file: Any, tensor: str, index: Path) -> None:
    """Decides by the string alone: a hub cache is full of links out of the folder, so where it leads proves nothing."""
    plain = isinstance(file, str) and file.isprintable() and not {"/", "\\"} & set(file)
    if not plain:
        raise CheckpointError(
            f"{index}: tensor {tensor!r} is said to be in {file!r}, which is no plain file name; "
            "only files beside the index are read: do not trust this checkpoint"
        )
    if Path(file).suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(f"{index}: tensor {tensor!r} is in {file}: pickled weights are never opened; {_CONVERT}")
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{index}: tensor {tensor!r} is said to be in {file!r}, which is no .safetensors file")
