"""GLM-4.5, -4.6 and -4.5-Air: what their ``config.json`` means, and what their tensors are called.

Source: GLM-4.5 Team (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from duoserve.architecture import Blocks, MoEConfig, SharedExpertConfig
from duoserve.config import ModelConfig
from duoserve.models.common_fields import (
    corrected_router,
    grouped_query,
    head_dim,
    layers_behind_dense,
    model_config,
    mtp_layers,
    refuse_unsupported,
    shared_experts,
    width,
)
from duoserve.models.config_fields import ConfigFields
from duoserve.models.decoder import MoENames
from duoserve.models.expert_names import separate
from duoserve.models.family import Family
from duoserve.models.rope_fields import rope_config

MODEL_TYPE = "glm4_moe"
# The values of absent fields in transformers' Glm4MoeConfig.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    aliases = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    fields = ConfigFields.completed(raw, DEFAULTS, aliases)
    refuse_unsupported(fields)
    attention = replace(grouped_query(fields), qkv_bias=fields.flag("attention_bias"))
    if fields.flag("use_qk_norm"):
        attention = replace(attention, qk_norm="head")
    expert_width = width(fields, "moe_intermediate_size")
    blocks = Blocks(
        attention=attention,
        rope=rope_config(fields, head_dim(fields), partial=True),
        moe=MoEConfig(
            corrected_router(fields),
            expert_width,
            layers_behind_dense(fields),
            dense_intermediate_size=width(fields, "intermediate_size"),
            shared=SharedExpertConfig(shared_experts(fields) * expert_width),
        ),
        mtp_layers=mtp_layers(fields),
    )
    return model_config(fields, MODEL_TYPE, blocks)


FAMILY = Family(MODEL_TYPE, "Glm4MoeForCausalLM", parse_config, MoENames(), separate)
