"""OLMoE: what its ``config.json`` means, and what its tensors are called. Source: Muennighoff et al. (2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from duoserve.architecture import AttentionConfig, Blocks, MoEConfig, RouterConfig
from duoserve.config import ModelConfig
from duoserve.models.common_fields import (
    grouped_query,
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
from duoserve.models.rope_fields import rope_config

MODEL_TYPE = "olmoe"
# The values of absent fields in transformers' OlmoeConfig.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": None,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    fields = ConfigFields.completed(raw, DEFAULTS, aliases={"num_local_experts": "num_experts"})
    refuse_unsupported(fields)
    fields.absent("sliding_window", "supported: null")
    attention, experts = _attention(fields), num_experts(fields, "num_experts")
    router = RouterConfig(experts, top_k(fields, experts), renormalize=fields.flag("norm_topk_prob"), rounded=True)
    blocks = Blocks(
        attention=attention,
        rope=rope_config(fields, attention.head_dim),
        moe=MoEConfig(router, width(fields, "intermediate_size"), tuple(range(num_layers(fields)))),
    )
    return model_config(fields, MODEL_TYPE, blocks)


def _attention(fields: ConfigFields) -> AttentionConfig:
    """Attention whose queries and keys are normed before they are split into heads, then clipped like the values."""
    fields.absent("head_dim", "supported: null; the heads share the hidden size")
    bias = fields.flag("attention_bias")
    clip = None if fields.is_null("clip_qkv") else fields.number("clip_qkv", 0, 1e6)
    return replace(grouped_query(fields), qkv_bias=bias, out_bias=bias, qk_norm="projection", clip=clip)


FAMILY = Family(MODEL_TYPE, "OlmoeForCausalLM", parse_config, MoENames(), separate)
