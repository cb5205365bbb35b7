"""A checkpoint as ``info`` and ``pack`` need it: checked against its family, no weights read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from duoserve.config import ModelConfig
from duoserve.experts.checkpoint import Checkpoint, resolve
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.models.registry import Family, family_of


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


@contextmanager
def opened(model: str) -> Iterator[OpenedModel]:
    """The model by folder, hub id or embedded name; ConfigError or CheckpointError for what cannot be run."""
    with closing(Checkpoint.open(resolve(model))) as checkpoint:
        family = family_of(checkpoint.config)
        config = family.parse_config(checkpoint.config)
        checkpoint.check(family.tensor_shapes(config))
        yield OpenedModel(checkpoint, family, config)
