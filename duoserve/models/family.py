"""A model family: what its ``config.json`` means and what its tensors are called; blocks and loading are shared."""

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
    """A dry run computes nothing."""

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> NoReturn:
        raise IntegrityError(f"layer {layer} of a dry run asked for experts")


_NO_EXPERTS = RoutedExperts(_NoSource(), ExpertWeights(torch.empty(0, 0, 0), torch.empty(0, 0, 0)))


@dataclass(frozen=True)
class Family:
    """``model_type`` and ``architecture`` are config.json's names for it; ``parse_config`` maps a raw config.json.

    ``names`` are those of a layer's feed-forward block, ``expert_pieces`` the tensors of one routed expert.
    """

    model_type: str
    architecture: str
    parse_config: Callable[[dict[str, Any]], ModelConfig]
    names: MoENames
    expert_pieces: Callable[[ModelConfig, ExpertId], ExpertPieces]

    def build(self, config: ModelConfig, read: ReadTensor, experts: RoutedExperts) -> Transformer:
        """The model from a reader of dense tensors; its routed experts are left to ``experts``."""
        return load_decoder(config, self.names, Tensors.of(read), experts)

    def dense_needs(self, config: ModelConfig) -> dict[str, TensorNeed]:
        """Every tensor that ``build`` will read; a tied head has none of its own."""
        return needs_of(lambda tensors: load_decoder(config, self.names, tensors, _NO_EXPERTS))

    def dense_bytes(self, config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes in ``dtype`` of everything that is not a routed expert."""
        return sum(self.dense_sizes(config, dtype))

    def dense_sizes(self, config: ModelConfig, dtype: torch.dtype) -> list[int]:
        """The same, tensor by tensor."""
        needs = self.dense_needs(config).values()
        return [prod(need.shape) * (need.dtype or dtype).itemsize for need in needs]

    def expert_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor that routed experts lie in, name -> shape."""
        experts = ModelShape.of(config).all_experts()
        return {piece.name: piece.shape for expert in experts for piece in self.expert_pieces(config, expert)}

    def tensor_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint, name -> shape."""
        return {name: need.shape for name, need in self.dense_needs(config).items()} | self.expert_shapes(config)
