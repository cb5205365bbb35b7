"""A checkpoint, checked against its family; no weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from duoserve.config import ModelConfig
from duoserve.experts.checkpoint import Checkpoint, is_ignorable, resolve
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.packing import CheckpointStore
from duoserve.experts.strict_json import read_object
from duoserve.models.config_fields import Fields
from duoserve.models.family import Family
from duoserve.models.registry import family_of

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_CONFIG_BYTES = 1 << 20
HEAD = "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d{1,6})\.", re.ASCII)


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, what its config.json means, and who knows its tensors."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig

    @property
    def experts(self) -> list[ExpertId]:
        """Every routed expert, layer by layer."""
        return [ExpertId(layer, e) for layer in self.config.moe_layers for e in range(self.config.num_experts)]

    @property
    def pack_layers(self) -> int:
        """Layers of a pack: up to the last that has experts."""
        return self.config.moe_layers[-1] + 1

    def layout(self, dtype: torch.dtype) -> ExpertLayout:
        """The row of one expert in ``dtype``."""
        return ExpertLayout(dtype, self.config.hidden_size, self.config.expert_intermediate_size)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes in ``dtype`` of everything that is not a routed expert."""
        needs = self.family.dense_needs(self.config).values()
        return sum(prod(need.shape) * (need.dtype or dtype).itemsize for need in needs)

    def expert_store(self, dtype: torch.dtype) -> CheckpointStore:
        """The routed experts, packed in ``dtype`` when they are read."""
        return CheckpointStore(self.checkpoint, self.layout(dtype), partial(self.family.expert_pieces, self.config))


@contextmanager
def opened(model: str | Path) -> Iterator[OpenedModel]:
    """The model by folder, hub id or embedded name; ConfigError or CheckpointError for what cannot be run."""
    with closing(Checkpoint.open(resolve(model))) as checkpoint:
        family = family_of(checkpoint.config)
        config = _with_end_tokens(family.parse_config(checkpoint.config), checkpoint.folder / GENERATION_CONFIG)
        if HEAD in checkpoint.tensors:  # a head of its own is used even where the config calls it tied
            config = replace(config, tie_word_embeddings=False)
        checkpoint.check(family.tensor_shapes(config), partial(is_unused, config))
        yield OpenedModel(checkpoint, family, config)


def is_unused(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is none of the model's: what no model needs, and the layers that guess further tokens."""
    layer = LAYER.match(name)
    is_mtp = layer and config.num_layers <= int(layer[1]) < config.num_layers + config.blocks.mtp_layers
    return is_ignorable(name) or bool(is_mtp)


def _with_end_tokens(config: ModelConfig, path: Path) -> ModelConfig:
    """generation_config.json, where there is one, knows the tokens that end a text better than config.json."""
    if not path.exists():
        return config
    raw = read_object(path, MAX_GENERATION_CONFIG_BYTES)
    if raw.get("eos_token_id") is None:
        return config
    return replace(config, eos_token_ids=Fields(raw, where=path.name).token_ids("eos_token_id", 0))
