"""gpt-oss: what its ``config.json`` means, and what its tensors are called. Source: OpenAI (2025), model card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from duoserve.architecture import AttentionConfig, Blocks, ClampConfig, MoEConfig, RouterConfig
from duoserve.config import ModelConfig
from duoserve.models.common_fields import (
    grouped_query,
    head_dim,
    layer_windows,
    model_config,
    num_experts,
    num_layers,
    refuse_unsupported,
    top_k,
    width,
)
from duoserve.models.config_fields import ConfigFields
from duoserve.models.decoder import MoENames
from duoserve.models.expert_names import transposed
from duoserve.models.family import Family
from duoserve.models.rope_fields import MAX_POSITIONS, rope_config

MODEL_TYPE = "gpt_oss"
ROPE = "rope_parameters"  # null is the default too
# The values of absent fields in transformers' GptOssConfig.
DEFAULTS: dict[str, Any] = {
    "attention_bias": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-5,
    ROPE: {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    given = {name: value for name, value in raw.items() if name != ROPE or value is not None}
    fields = ConfigFields.completed(given, DEFAULTS, aliases={"num_experts": "num_local_experts"})
    refuse_unsupported(fields)
    experts = num_experts(fields, "num_local_experts")
    router = RouterConfig(experts, top_k(fields, experts), scoring="softmax_of_topk", rounded=True, bias=True)
    clamp = ClampConfig(fields.number("swiglu_alpha", 0, 1e3), fields.number("swiglu_limit", 0, 6e4))
    blocks = Blocks(
        attention=_attention(fields),
        rope=rope_config(fields, head_dim(fields)),
        moe=MoEConfig(router, width(fields, "intermediate_size"), tuple(range(num_layers(fields))), clamp=clamp),
    )
    return model_config(fields, MODEL_TYPE, blocks, formats=("mxfp4",))


def _attention(fields: ConfigFields) -> AttentionConfig:
    """Attention with a window in every other layer, beginning with the first, and a sink for every head."""
    bias, window = fields.flag("attention_bias"), fields.optional_integer("sliding_window", 1, MAX_POSITIONS)
    windows = layer_windows(fields, window, [layer % 2 == 0 for layer in range(num_layers(fields))])
    return replace(grouped_query(fields), windows=windows, qkv_bias=bias, out_bias=bias, sinks=True)


FAMILY = Family(MODEL_TYPE, "GptOssForCausalLM", parse_config, MoENames(router="router"), transposed)
