"""Describes a model by its config and its index, while only some or none of its weights are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from duoserve.config import ModelConfig
from duoserve.experts.hub import DESCRIPTION_FILES, resolve_model
from duoserve.experts.shards import CONFIG_FILE, INDEX_FILE, has_weights
from duoserve.files.positional import is_there
from duoserve.models.family import Family
from duoserve.models.opened import by_index, opened
from duoserve.models.stored import by_tensors, stored_bytes, stored_tensors

HEADERS, INDEX, CONFIG = "the weights' headers", INDEX_FILE, CONFIG_FILE


@dataclass(frozen=True)
class DescribedModel:
    """A model by its config. ``nbytes`` has the bytes of every tensor that it needs; ``source`` says from where."""

    folder: Path
    family: Family
    config: ModelConfig
    nbytes: Mapping[str, int]
    source: str


def described(model: str | Path) -> DescribedModel:
    """The model of a folder, a hub id or an embedded name; of a hub id only small files are downloaded.

    Raises ConfigError or CheckpointError if these files show that it cannot be run.
    """
    folder = resolve_model(model, DESCRIPTION_FILES)
    return _from_headers(folder) if has_weights(folder) else _from_index(folder)


def _from_headers(folder: Path) -> DescribedModel:
    with opened(folder) as found:
        stored = stored_tensors(found.family, found.config, by_tensors(found.checkpoint.tensors))
        nbytes = {name: found.checkpoint.tensors[name].nbytes for name in stored}
        return DescribedModel(folder, found.family, found.config, nbytes, HEADERS)


def _from_index(folder: Path) -> DescribedModel:
    """The model without its weights; bytes follow from shapes and dtypes."""
    family, config, stored = by_index(folder)
    nbytes = {name: stored_bytes(tensor, config.dtype) for name, tensor in stored.items()}
    return DescribedModel(folder, family, config, nbytes, INDEX if is_there(folder / INDEX_FILE) else CONFIG)
