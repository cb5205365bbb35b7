"""Qwen3-MoE: what its ``config.json`` means, and what its tensors are called. Source: Yang et al. (2025)."""

from __future__ import annotations

from dataclasses import replace
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
    sparse_layers,
    top_k,
    used_window,
    width,
)
from duoserve.models.config_fields import ConfigFields
from duoserve.models.decoder import MoENames
from duoserve.models.expert_names import separate
from duoserve.models.family import Family
from duoserve.models.rope_fields import rope_config

MODEL_TYPE = "qwen3_moe"
# The values of absent fields in transformers' Qwen3MoeConfig.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "eos_token_id": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    fields = ConfigFields.completed(raw, DEFAULTS, aliases={"num_local_experts": "num_experts"})
    refuse_unsupported(fields)
    experts, bias = num_experts(fields, "num_experts"), fields.flag("attention_bias")
    router = RouterConfig(experts, top_k(fields, experts), renormalize=fields.flag("norm_topk_prob"), rounded=True)
    windows = (used_window(fields),) * num_layers(fields)
    blocks = Blocks(
        attention=replace(grouped_query(fields), windows=windows, qkv_bias=bias, out_bias=bias, qk_norm="head"),
        rope=rope_config(fields, head_dim(fields)),
        moe=MoEConfig(
            router,
            width(fields, "moe_intermediate_size"),
            sparse_layers(fields),
            dense_intermediate_size=width(fields, "intermediate_size"),
        ),
    )
    return model_config(fields, MODEL_TYPE, blocks)


FAMILY = Family(MODEL_TYPE, "Qwen3MoeForCausalLM", parse_config, MoENames(), separate)
