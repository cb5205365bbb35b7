"""The sizes that determine what a pass reads and computes, from the tensors that a model's blocks ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch

from duoserve.config import ModelConfig
from duoserve.experts.layout import ExpertLayout
from duoserve.kv_cache import kv_bytes_per_token
from duoserve.models.described import DescribedModel
from duoserve.models.family import Family
from duoserve.models.opened import OpenedModel
from duoserve.planning.formats import layout_in
from duoserve.replaying.hardware import LayerSizes
from duoserve.scheduling.plan import ModelShape

_LAYER = re.compile(r"model\.layers\.(\d+)\.", re.ASCII)


@dataclass(frozen=True)
class ModelSizes:
    """A model's sizes: ``layer`` is the mean of all MoE layers; parameters count what lies outside of these.

    Every token goes through the ``dense_params`` of the layers without experts, and only the last token of a sequence
    through the ``head_params``. ``kv_bytes`` are those of a layer for one token of context.
    """

    layer: LayerSizes
    shape: ModelShape
    dense_params: int
    head_params: int
    kv_bytes: int


def sizes_of(family: Family, config: ModelConfig, layout: ExpertLayout, dtype: torch.dtype) -> ModelSizes:
    """The sizes of a model with its experts in ``layout`` and all else in ``dtype``."""
    params, moe = dict.fromkeys(range(config.num_layers), 0), config.moe_layers
    for name, need in family.dense_needs(config).items():
        if of_layer := _LAYER.match(name):
            params[int(of_layer[1])] += prod(need.shape)
    expert_params = 3 * config.hidden_size * config.expert_intermediate_size
    layer = LayerSizes(
        config.model_type,
        expert_params,
        8 * layout.slot_bytes / expert_params,
        sum(params[number] for number in moe) // len(moe),
        config.blocks.attention.width,
        8 * dtype.itemsize,
    )
    return ModelSizes(
        layer,
        ModelShape.of(config),
        sum(count for number, count in params.items() if number not in moe),
        config.vocab_size * config.hidden_size,
        kv_bytes_per_token(config, dtype) // config.num_layers,
    )


def layer_sizes(model: DescribedModel | OpenedModel, form: str | None = None) -> LayerSizes:
    """One MoE layer with its experts in ``form``, one of FORMATS, or None for the checkpoint's.

    Raises ConfigError as ``layout_in`` does.
    """
    config = model.config
    return sizes_of(model.family, config, layout_in(config, form, config.dtype), config.dtype).layer
