"""Granite-MoE: what its ``config.json`` means, and what its tensors are called. Source: IBM Granite Team (2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from duoserve.architecture import Blocks, MoEConfig, Multipliers, RouterConfig
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
from duoserve.models.expert_names import fused
from duoserve.models.family import Family
from duoserve.models.rope_fields import rope_config

MODEL_TYPE = "granitemoe"
# The values of absent fields in transformers' GraniteMoeConfig.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "attention_multiplier": 1.0,
    "bos_token_id": 1,
    "embedding_multiplier": 1.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "logits_scaling": 1.0,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "num_local_experts": 8,
    "residual_multiplier": 1.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MAX_MULTIPLIER = 1e6


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    fields = ConfigFields.completed(raw, DEFAULTS, aliases={"num_experts": "num_local_experts"})
    refuse_unsupported(fields)
    experts, bias = num_experts(fields, "num_local_experts"), fields.flag("attention_bias")
    scale = _multiplier(fields, "attention_multiplier")
    router = RouterConfig(experts, top_k(fields, experts), scoring="softmax_of_topk", rounded=True)
    blocks = Blocks(
        attention=replace(grouped_query(fields), scale=scale, qkv_bias=bias, out_bias=bias),
        rope=rope_config(fields, head_dim(fields)),
        moe=MoEConfig(router, width(fields, "intermediate_size"), tuple(range(num_layers(fields)))),
        multipliers=Multipliers(
            embedding=_multiplier(fields, "embedding_multiplier"),
            residual=_multiplier(fields, "residual_multiplier"),
            logits_divisor=_multiplier(fields, "logits_scaling"),
        ),
    )
    return model_config(fields, MODEL_TYPE, blocks, formats=())


def _multiplier(fields: ConfigFields, name: str) -> float:
    return fields.number(name, 0, MAX_MULTIPLIER)


FAMILY = Family(
    MODEL_TYPE,
    "GraniteMoeForCausalLM",
    parse_config,
    MoENames(block="block_sparse_moe", router="router.layer"),
    fused,
)
