"""A model family: the meaning of its ``config.json`` and the names of its tensors; blocks and loading are shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import torch

from duoserve.config import ModelConfig
from duoserve.errors import IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.experts.pieces import ExpertPieces
from duoserve.kernels import ExpertWeights
from duoserve.models.decoder import MoENames, RoutedExperts, load_decoder
from duoserve.models.tensors import ReadTensor, TensorNeed, Tensors, needs_of
from duoserve.models.transformer import Transformer
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.source import ExpertSource


class _NoSource(ExpertSource):
    """The experts of a dry run, which computes nothing."""

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> NoReturn:
        raise IntegrityError(f"layer {layer} of a dry run asked for experts")


_NO_EXPERTS = RoutedExperts(_NoSource(), ExpertWeights(torch.empty(0, 0, 0), torch.empty(0, 0, 0)))


@dataclass(frozen=True)
class Family:
    """A family. ``model_type`` and ``architecture`` are its names in config.json, which ``parse_config`` maps.

    ``names`` are its names for a layer's feed-forward block; ``expert_pieces`` gives the tensors of a routed expert.
    """

    model_type: str
    architecture: str
    parse_config: Callable[[dict[str, Any]], ModelConfig]
    names: MoENames
    expert_pieces: Callable[[ModelConfig, ExpertId], ExpertPieces]

    def build(self, config: ModelConfig, read: ReadTensor, experts: RoutedExperts) -> Transformer:
        """Builds the model; ``read`` reads its dense tensors, and ``experts`` has its routed experts."""
        return load_decoder(config, self.names, Tensors.of(read), experts)

    def dense_needs(self, config: ModelConfig) -> dict[str, TensorNeed]:
        """Every tensor that ``build`` will read; there is none for a tied head."""
        return needs_of(lambda tensors: load_decoder(config, self.names, tensors, _NO_EXPERTS))

    def dense_bytes(self, config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes in ``dtype`` of everything that is not a routed expert."""
        return sum(self.dense_sizes(config, dtype))

    def dense_sizes(self, config: ModelConfig, dtype: torch.dtype) -> list[int]:
        """Bytes in ``dtype`` of each tensor that is not part of a routed expert."""
        needs = self.dense_needs(config).values()
        return [prod(need.shape) * (need.dtype or dtype).itemsize for need in needs]

    def expert_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that routed experts lie in."""
        experts = ModelShape.of(config).all_experts()
        return {piece.name: piece.shape for expert in experts for piece in self.expert_pieces(config, expert)}

    def tensor_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of a checkpoint."""
        return {name: need.shape for name, need in self.dense_needs(config).items()} | self.expert_shapes(config)
