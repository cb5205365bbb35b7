"""Mixtral: what its ``config.json`` means, and what its tensors are called. Source: Jiang et al. (2024)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from duoserve.architecture import Blocks, MoEConfig, RouterConfig
from duoserve.config import ModelConfig
from duoserve.models.common_fields import (
    grouped_query,
    head_dim,
    model_config,
    num_experts,
    num_layers,
    refuse_unsupported,
    top_k,
    width,
)
from duoserve.models.config_fields import ConfigFields
from duoserve.models.decoder import MoENames
from duoserve.models.expert_names import separate
from duoserve.models.family import Family
from duoserve.models.rope_fields import MAX_POSITIONS, rope_config

MODEL_TYPE = "mixtral"
# The values of absent fields in transformers' MixtralConfig.
DEFAULTS: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    fields = ConfigFields.completed(raw, DEFAULTS, aliases={"num_experts": "num_local_experts"})
    refuse_unsupported(fields)
    if fields.flag("attention_bias", False):
        raise fields.refusal("attention_bias", "supported: false")
    experts, layers = num_experts(fields, "num_local_experts"), num_layers(fields)
    window = fields.optional_integer("sliding_window", 1, MAX_POSITIONS)
    router = RouterConfig(experts, top_k(fields, experts))
    blocks = Blocks(
        attention=replace(grouped_query(fields), windows=(window,) * layers),
        rope=rope_config(fields, head_dim(fields)),
        moe=MoEConfig(router, width(fields, "intermediate_size"), tuple(range(layers))),
    )
    return model_config(fields, MODEL_TYPE, blocks)


FAMILY = Family(
    model_type=MODEL_TYPE,
    architecture="MixtralForCausalLM",
    parse_config=parse_config,
    names=MoENames(block="block_sparse_moe"),
    expert_pieces=partial(separate, block="block_sparse_moe", names=("w1", "w3", "w2")),
)
