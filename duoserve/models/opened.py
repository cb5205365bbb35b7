"""Opens a checkpoint and checks it against its family. The only weights read are biases that must be zeros."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.errors import CheckpointError, ConfigError
from duoserve.experts.checkpoint import FLOATS, MAX_CONFIG_BYTES, Checkpoint, check_names, is_ignorable
from duoserve.experts.formats.codes import StoredTensor, WeightFormat
from duoserve.experts.formats.reading import read_dense
from duoserve.experts.hub import DESCRIPTION_FILES, resolve_model
from duoserve.experts.layout import DTYPES, ExpertId, ExpertLayout
from duoserve.experts.packing import CheckpointStore
from duoserve.experts.quantizing import QuantizingStore
from duoserve.experts.scale_search import OP_BY_OP, Way
from duoserve.experts.shards import CONFIG_FILE, INDEX_FILE, has_weights, weight_map
from duoserve.experts.store import ExpertStore
from duoserve.files.positional import is_there
from duoserve.files.strict_json import read_object
from duoserve.kernels.compiled.compiler import can_compile
from duoserve.models.config_fields import ConfigFields
from duoserve.models.family import Family
from duoserve.models.registry import family_of
from duoserve.models.stored import (
    by_convention,
    by_names,
    by_tensors,
    expert_layout,
    float_experts,
    quantized_by_us,
    scale_dtype_of,
    stored_tensors,
    weight_format,
)
from duoserve.scheduling.plan import ModelShape

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_CONFIG_BYTES = 1 << 20
HEAD = "lm_head.weight"
WORTH_COMPILING = 1 << 30  # quantizing this many bytes of experts op by op takes about as long as compiling
LAYER = re.compile(r"model\.layers\.(\d{1,6})\.", re.ASCII)


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that can be run: its files, its family, and what its config.json means."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig

    @property
    def experts(self) -> list[ExpertId]:
        """Every routed expert, layer by layer."""
        return list(ModelShape.of(self.config).all_experts())

    @property
    def pack_layers(self) -> int:
        """The number of layers of a pack: all up to the last that has experts."""
        return ModelShape.of(self.config).depth

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of that ``name`` (one of DTYPES), the checkpoint's if it is "auto"; ConfigError for other names."""
        if name == "auto":
            return self.config.dtype
        if name not in DTYPES:
            raise ConfigError(f"dtype={name!r} is not supported: use 'auto', {', '.join(map(repr, DTYPES))}")
        return DTYPES[name]

    def layout(self, dtype: torch.dtype, quantize: str | None = None) -> ExpertLayout:
        """The row of bytes of one expert: quantized to ``quantize`` (one of QUANTIZE), or as the checkpoint has it.

        Experts that are not quantized are in ``dtype``.
        """
        if quantize is not None:
            stored = quantized_by_us(self.config, quantize)
            return ExpertLayout(stored, self.config.hidden_size, self.config.expert_intermediate_size)
        return expert_layout(self.config, dtype, scale_dtype_of(self.family, self.config, self.checkpoint.tensors))

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """The bytes that everything but the routed experts takes in ``dtype``."""
        return self.family.dense_bytes(self.config, dtype)

    def expert_store(self, dtype: torch.dtype, quantize: str | None = None) -> ExpertStore:
        """A store that reads the routed experts from the checkpoint, and makes the row of ``layout`` of each."""
        if quantize is not None:
            return self._quantizing_store(quantize)
        pieces = partial(self.family.expert_pieces, self.config)
        return CheckpointStore(self.checkpoint, self.layout(dtype), pieces, weight_format(self.config))

    def _quantizing_store(self, kind: str) -> QuantizingStore:
        """Its loops are compiled if there is a C++ compiler, and if there are enough experts to be worth that."""
        source = self.expert_store(self.config.dtype)
        compiles = can_compile() and len(self.experts) * source.layout.slot_bytes >= WORTH_COMPILING
        return QuantizingStore(source, quantized_by_us(self.config, kind), Way.compiled() if compiles else OP_BY_OP)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Reads a tensor that is not part of a routed expert, in ``dtype``, and decodes it if it is quantized."""
        if name not in self._quantized:
            return self.checkpoint.read(name, dtype)
        form, (num_rows, inner) = self._quantized[name]
        return read_dense(self.checkpoint, form, name, (num_rows, inner)).to(dtype)

    @cached_property
    def _quantized(self) -> dict[str, tuple[WeightFormat, tuple[int, ...]]]:
        """Name -> format and shape of every quantized matrix that is not part of a routed expert."""
        form, is_quantized = weight_format(self.config), by_tensors(self.checkpoint.tensors)
        needs = self.family.dense_needs(self.config).items()
        return {} if form is None else {n: (form, need.shape) for n, need in needs if is_quantized(n, form)}


@contextmanager
def opened(model: str | Path) -> Iterator[OpenedModel]:
    """Opens the model of a folder, a hub id or an embedded name.

    Raises ConfigError or CheckpointError if it cannot be run; where a hub id's config or index shows that, before its
    weights are downloaded.
    """
    with closing(Checkpoint.open(_complete_folder(model))) as checkpoint:
        family, config = _parsed(checkpoint.config, checkpoint.folder)
        if HEAD in checkpoint.tensors:  # a head of its own is used even if the config calls it tied
            config = replace(config, tie_word_embeddings=False)
        is_quantized = by_tensors(checkpoint.tensors)
        _check_described(config, checkpoint.tensors, checkpoint.folder)
        _check_experts(checkpoint.folder, float_experts(family, config, checkpoint.tensors, is_quantized))
        stored = stored_tensors(family, config, is_quantized)
        checkpoint.check(
            {name: tensor.shape for name, tensor in stored.items()},
            partial(is_unused, config, stored),
            {name: tensor.dtypes for name, tensor in stored.items()},
        )
        _check_spare_biases(config, stored, checkpoint)
        yield OpenedModel(checkpoint, family, _with_dtype(config, checkpoint, stored))


def _complete_folder(model: str | Path) -> Path:
    """The folder of ``model`` with its weights. If they are not here yet, its config and index are checked first."""
    folder = resolve_model(model, DESCRIPTION_FILES)
    if not has_weights(folder):
        by_index(folder)
    return resolve_model(model)


def by_index(folder: Path) -> tuple[Family, ModelConfig, dict[str, StoredTensor]]:
    """The family, config and tensors (by name) of a model whose weights need not be there.

    They follow from its config and its index, or from its config alone if there is no index. Raises ConfigError or
    CheckpointError if these files show that the model cannot be run.
    """
    listed = weight_map(folder) if is_there(folder / INDEX_FILE) else None
    family, config = _parsed(read_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES), folder)
    if listed is not None and HEAD in listed:
        config = replace(config, tie_word_embeddings=False)
    is_quantized = by_convention(config) if listed is None else by_names(listed)
    stored = stored_tensors(family, config, is_quantized)
    if listed is not None:
        _check_described(config, listed, folder)
        _check_experts(folder, float_experts(family, config, listed, is_quantized))
        check_names(folder, listed, stored, partial(is_unused, config, stored))
    return family, config, stored


def _parsed(raw: dict[str, Any], folder: Path) -> tuple[Family, ModelConfig]:
    """What ``folder`` says of a model besides its tensors; ``raw`` is its config.json."""
    family = family_of(raw)
    return family, _with_end_tokens(family.parse_config(raw), folder / GENERATION_CONFIG)


def _check_described(config: ModelConfig, names: Iterable[str], folder: Path) -> None:
    """Raises CheckpointError if a tensor of ``names`` has codes of AWQ or GPTQ, but the config does not say so."""
    found = None if config.quantization else next((name for name in names if name.endswith(".qweight")), None)
    if found is not None:
        raise CheckpointError(
            f"{folder}: tensor {found!r} is quantized, but config.json has no quantization_config, where it says how; "
            "put the object that is in quantize_config.json or quant_config.json into config.json under that name, "
            'with its "quant_method": "gptq" or "awq"'
        )


def _check_experts(folder: Path, floats: Sequence[str]) -> None:
    """Raises CheckpointError for experts in ``floats`` of a quantized model, whose experts have one format."""
    if floats:
        more = f" and {len(floats) - 1} more are" if len(floats) > 1 else " is"
        raise CheckpointError(
            f"{folder}: {floats[0]!r}{more} in floats, though config.json calls the experts quantized; some experts in "
            "floats beside others that are quantized are not supported: take a checkpoint that has all experts "
            "quantized, or none"
        )


def is_unused(config: ModelConfig, needed: Collection[str], name: str) -> bool:
    """Whether a checkpoint may have the tensor ``name`` though the model does not need it.

    It may be a tensor that no model needs, one of a layer that guesses further tokens, or a spare bias of GPTQ.
    """
    layer = LAYER.match(name)
    is_mtp = layer and config.num_layers <= int(layer[1]) < config.num_layers + config.blocks.mtp_layers
    return is_ignorable(name) or bool(is_mtp) or _is_spare_bias(config, needed, name)


def _is_spare_bias(config: ModelConfig, needed: Collection[str], name: str) -> bool:
    """Whether ``name`` is the bias of a matrix that has none in the model; AutoGPTQ wrote zeros until March 2024."""
    module, _, part = name.rpartition(".")
    is_gptq = config.quantization is not None and config.quantization.method == "gptq"
    return is_gptq and part == "bias" and name not in needed and f"{module}.qweight" in needed


def _check_spare_biases(config: ModelConfig, needed: Collection[str], checkpoint: Checkpoint) -> None:
    """Reads GPTQ's spare biases, some tens of MB, which the model ignores; raises CheckpointError if any is not 0."""
    for name, info in checkpoint.tensors.items():
        if _is_spare_bias(config, needed, name) and checkpoint.read(name, torch.float64).any():
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is not all zeros, but the model has no place for a bias there; "
                "config.json and weights must be of one checkpoint"
            )


def _with_dtype(config: ModelConfig, checkpoint: Checkpoint, names: Iterable[str]) -> ModelConfig:
    """``config`` with the dtype of the first float tensor of ``names`` if config.json has none (as that of gpt-oss)."""
    if ConfigFields(checkpoint.config).says_dtype:
        return config
    dtypes = (checkpoint.info(name).dtype for name in names)
    return replace(config, dtype=next(dtype for dtype in dtypes if dtype in FLOATS))


def _with_end_tokens(config: ModelConfig, path: Path) -> ModelConfig:
    """``config`` with the end tokens of generation_config.json in place of its own, if that names any.

    So has transformers; if the file names none, its generation ends at no token, but here at those of config.json.
    """
    if not is_there(path):
        return config
    raw = read_object(path, MAX_GENERATION_CONFIG_BYTES)
    if raw.get("eos_token_id") is None:
        return config
    return replace(config, eos_token_ids=ConfigFields(raw, where=path.name).token_ids("eos_token_id", 0))
