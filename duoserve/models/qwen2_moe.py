"""Qwen2-MoE: what its ``config.json`` means, and what its tensors are called. Source: Yang et al. (2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from duoserve.architecture import AttentionConfig, Blocks, MoEConfig, RouterConfig, SharedExpertConfig
from duoserve.config import ModelConfig
from duoserve.models.common_fields import (
    grouped_query,
    head_dim,
    layer_windows,
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

MODEL_TYPE = "qwen2_moe"
# The values of absent fields in transformers' Qwen2MoeConfig.
DEFAULTS: dict[str, Any] = {
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "eos_token_id": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mlp_only_layers": [],
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    fields = ConfigFields.completed(raw, DEFAULTS, aliases={"num_local_experts": "num_experts"})
    refuse_unsupported(fields)
    experts = num_experts(fields, "num_experts")
    router = RouterConfig(experts, top_k(fields, experts), renormalize=fields.flag("norm_topk_prob"), rounded=True)
    blocks = Blocks(
        attention=_attention(fields),
        rope=rope_config(fields, head_dim(fields)),
        moe=MoEConfig(
            router,
            width(fields, "moe_intermediate_size"),
            sparse_layers(fields),
            dense_intermediate_size=width(fields, "intermediate_size"),
            shared=SharedExpertConfig(width(fields, "shared_expert_intermediate_size"), gated=True),
        ),
    )
    return model_config(fields, MODEL_TYPE, blocks)


def _attention(fields: ConfigFields) -> AttentionConfig:
    """Attention that may have biases; if windows are used, every other layer below ``max_window_layers`` has one."""
    window = used_window(fields)
    below = fields.integer("max_window_layers", 0, 1000)
    slides = [window is not None and layer % 2 == 0 and layer < below for layer in range(num_layers(fields))]
    windows = layer_windows(fields, window, slides)
    return replace(grouped_query(fields), windows=windows, qkv_bias=fields.flag("qkv_bias"))


FAMILY = Family(MODEL_TYPE, "Qwen2MoeForCausalLM", parse_config, MoENames(shared="shared_expert"), separate)
