"""From the architecture that a ``config.json`` names to the family that implements it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.experts.layout import ExpertId
from duoserve.experts.packing import ExpertNames
from duoserve.kernels import ExpertWeights
from duoserve.models import mixtral
from duoserve.models.config_fields import Fields
from duoserve.models.transformer import Transformer
from duoserve.scheduling.source import ExpertSource

Build = Callable[[ModelConfig, Callable[[str], Tensor], ExpertSource, ExpertWeights], Transformer]


@dataclass(frozen=True)
class Family:
    """One model family: ``model_types`` and ``architectures`` are config.json's names for it.

    ``tensor_shapes`` gives every tensor of a checkpoint (name -> shape), ``expert_names`` those of one expert.
    ``build`` makes the model from a reader of dense tensors, the source of its experts, and the slots' weights.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    parse_config: Callable[[dict[str, Any]], ModelConfig]
    tensor_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    expert_names: Callable[[ExpertId], ExpertNames]
    build: Build


FAMILIES = (
    Family(
        model_types=(mixtral.MODEL_TYPE,),
        architectures=(mixtral.ARCHITECTURE,),
        parse_config=mixtral.parse_config,
        tensor_shapes=mixtral.tensor_shapes,
        expert_names=mixtral.expert_names,
        build=mixtral.build,
    ),
)


def family_of(raw: dict[str, Any]) -> Family:
    """The family of a raw ``config.json``; ConfigError lists what there is if model_type or architecture is unknown."""
    for family in FAMILIES:
        if raw.get("model_type") in family.model_types:
            _check_architectures(raw, family)
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise Fields(raw).refusal("model_type", f"supported: {supported}")


def _check_architectures(raw: dict[str, Any], family: Family) -> None:
    """``architectures`` may be absent; where it is not, it must name a class that predicts the next token."""
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and any(name in family.architectures for name in named)):
        raise Fields(raw).refusal("architectures", f"supported: {', '.join(family.architectures)}")
