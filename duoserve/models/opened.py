"""A checkpoint, checked against its family; no weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from duoserve.config import ModelConfig
from duoserve.experts.checkpoint import Checkpoint, resolve
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.strict_json import read_object
from duoserve.models.config_fields import Fields
from duoserve.models.registry import Family, family_of

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_CONFIG_BYTES = 1 << 20
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, what its config.json means, and who knows its tensors."""

    checkpoint: Checkpoint
    family: Family
    config: ModelConfig

    @property
    def experts(self) -> list[ExpertId]:
        """Every routed expert, layer by layer."""
        return [ExpertId(layer, e) for layer in range(self.config.num_layers) for e in range(self.config.num_experts)]

    def layout(self, dtype: torch.dtype) -> ExpertLayout:
        """The row of one expert in ``dtype``."""
        return ExpertLayout(dtype, self.config.hidden_size, self.config.expert_intermediate_size)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes in ``dtype`` of everything that is not a routed expert."""
        experts = {name for expert in self.experts for name in self.family.expert_names(expert)}
        shapes = self.family.tensor_shapes(self.config)
        return sum(prod(shape) for name, shape in shapes.items() if name not in experts) * dtype.itemsize


@contextmanager
def opened(model: str | Path) -> Iterator[OpenedModel]:
    """The model by folder, hub id or embedded name; ConfigError or CheckpointError for what cannot be run."""
    with closing(Checkpoint.open(resolve(model))) as checkpoint:
        family = family_of(checkpoint.config)
        config = _with_end_tokens(family.parse_config(checkpoint.config), checkpoint.folder / GENERATION_CONFIG)
        if HEAD in checkpoint.tensors:  # a head of its own is used even where the config calls it tied
            config = replace(config, tie_word_embeddings=False)
        checkpoint.check(family.tensor_shapes(config))
        yield OpenedModel(checkpoint, family, config)


def _with_end_tokens(config: ModelConfig, path: Path) -> ModelConfig:
    """generation_config.json, where there is one, knows the tokens that end a text better than config.json."""
    if not path.exists():
        return config
    raw = read_object(path, MAX_GENERATION_CONFIG_BYTES)
    if raw.get("eos_token_id") is None:
        return config
    return replace(config, eos_token_ids=Fields(raw, where=path.name).token_ids("eos_token_id", 0))
