"""Describes a model by its config and its index, while only some or none of its weights are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from duoserve.config import ModelConfig
from duoserve.experts.checkpoint import MAX_CONFIG_BYTES, check_names
from duoserve.experts.hub import resolve_model
from duoserve.experts.shards import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, weight_map
from duoserve.files.positional import is_there
from duoserve.files.strict_json import read_object
from duoserve.models.family import Family
from duoserve.models.opened import HEAD, is_unused, opened
from duoserve.models.registry import family_of
from duoserve.models.stored import by_convention, by_names, by_tensors, stored_bytes, stored_tensors

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
    folder = resolve_model(model, weights=False)
    listed = _listed(folder)
    if listed is not None and all(is_there(folder / file) for file in listed.values()):
        return _from_headers(folder)
    return _from_index(folder, listed)


def _listed(folder: Path) -> Mapping[str, str] | None:
    """The file of each tensor, by the tensor's name, from the index; for a single file of weights only that file.

    None if neither is there.
    """
    if not any(is_there(folder / name) for name in (SINGLE_FILE, INDEX_FILE)):
        return None
    listed = weight_map(folder)
    return {"": SINGLE_FILE} if listed is None else listed


def _from_headers(folder: Path) -> DescribedModel:
    with opened(folder) as found:
        stored = stored_tensors(found.family, found.config, by_tensors(found.checkpoint.tensors))
        nbytes = {name: found.checkpoint.tensors[name].nbytes for name in stored}
        return DescribedModel(folder, found.family, found.config, nbytes, HEADERS)


def _from_index(folder: Path, listed: Mapping[str, str] | None) -> DescribedModel:
    """The model without its weights; bytes follow from shapes and dtypes."""
    raw = read_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    family = family_of(raw)
    config = family.parse_config(raw)
    if listed is not None and HEAD in listed:
        config = replace(config, tie_word_embeddings=False)
    stored = stored_tensors(family, config, by_convention(config) if listed is None else by_names(listed))
    if listed is not None:
        check_names(folder, listed, stored, partial(is_unused, config, stored))
    nbytes = {name: stored_bytes(tensor, config.dtype) for name, tensor in stored.items()}
    return DescribedModel(folder, family, config, nbytes, CONFIG if listed is None else INDEX)
