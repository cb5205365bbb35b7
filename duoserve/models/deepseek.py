"""DeepSeek-V2, -V2-Lite, -V3 and -R1: what their ``config.json`` means, and what their tensors are called.

Source: DeepSeek-AI (2024a, 2024b).
"""

from __future__ import annotations

from typing import Any

from duoserve.architecture import (
    Blocks,
    LatentAttentionConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    SharedExpertConfig,
)
from duoserve.config import ModelConfig
from duoserve.models.common_fields import (
    corrected_router,
    groups,
    layers_behind_dense,
    model_config,
    mtp_layers,
    num_experts,
    num_heads,
    refuse_unsupported,
    shared_experts,
    top_k,
    width,
)
from duoserve.models.config_fields import ConfigFields
from duoserve.models.decoder import MoENames
from duoserve.models.expert_names import separate
from duoserve.models.family import Family
from duoserve.models.rope_fields import rope_config

V2, V3 = "deepseek_v2", "deepseek_v3"
MAX_RANK = 1 << 16
# The values of absent fields that are the same in both of transformers' configs.
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
# DeepseekV2Config
DEFAULTS_V2 = DEFAULTS | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
# DeepseekV3Config
DEFAULTS_V3 = DEFAULTS | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "vocab_size": 129280,
}


def parse_v2(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; raises ConfigError if a field is unsupported or out of bounds."""
    fields = ConfigFields.completed(raw, DEFAULTS_V2, aliases={"num_experts": "n_routed_experts"})
    refuse_unsupported(fields)
    for name in ("mlp_bias", "norm_topk_prob"):
        if fields.flag(name):
            raise fields.refusal(name, "supported: false")
    return model_config(fields, V2, _blocks(fields, _router_v2(fields), interleaved=True))


def parse_v3(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a V3; errors as in ``parse_v2``."""
    aliases = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    fields = ConfigFields.completed(raw, DEFAULTS_V3, aliases)
    refuse_unsupported(fields)
    blocks = _blocks(fields, corrected_router(fields), fields.flag("rope_interleave"))
    _check_head_dim(fields, blocks.rope.dim)
    return model_config(fields, V3, blocks)


def _check_head_dim(fields: ConfigFields, rotated: int) -> None:
    """Checks ``head_dim``: in transformers' V3 it is the number of rotated dimensions, and null means another."""
    if "head_dim" in fields.names and fields.optional_integer("head_dim", 1, 1024) != rotated:
        raise fields.refusal("head_dim", f"it must be absent or qk_rope_head_dim, {rotated}")


def _blocks(fields: ConfigFields, router: RouterConfig, interleaved: bool) -> Blocks:
    rope = rope_config(fields, fields.integer("qk_rope_head_dim", 2, 1024), interleaved=interleaved)
    expert_width = width(fields, "moe_intermediate_size")
    return Blocks(
        attention=_attention(fields, rope),
        rope=rope,
        moe=MoEConfig(
            router,
            expert_width,
            layers_behind_dense(fields),
            dense_intermediate_size=width(fields, "intermediate_size"),
            shared=SharedExpertConfig(shared_experts(fields) * expert_width),
        ),
        mtp_layers=mtp_layers(fields),
    )


def _attention(fields: ConfigFields, rope: RopeConfig) -> LatentAttentionConfig:
    heads, nope = num_heads(fields), fields.integer("qk_nope_head_dim", 1, 1024)
    if fields.optional_integer("num_key_value_heads", 1, 4096) not in (None, heads):
        raise fields.refusal("num_key_value_heads", f"latent attention has one for each of the {heads} heads")
    return LatentAttentionConfig(
        num_heads=heads,
        query_rank=fields.optional_integer("q_lora_rank", 1, MAX_RANK),
        latent_dim=fields.integer("kv_lora_rank", 1, MAX_RANK),
        nope_dim=nope,
        rope_dim=rope.dim,
        value_dim=fields.integer("v_head_dim", 1, 1024),
        scale=(nope + rope.dim) ** -0.5 * (rope.yarn.score_scale if rope.yarn else 1.0),
        bias=fields.flag("attention_bias"),
    )


def _router_v2(fields: ConfigFields) -> RouterConfig:
    fields.choice("scoring_func", ["softmax"], "softmax")
    limited = fields.choice("topk_method", ["greedy", "group_limited_greedy"]) == "group_limited_greedy"
    experts = num_experts(fields, "n_routed_experts")
    chosen = top_k(fields, experts)
    n_group, topk_group = groups(fields, experts, chosen, least=1) if limited else (1, 1)
    return RouterConfig(
        num_experts=experts,
        top_k=chosen,
        renormalize=False,
        scale=fields.number("routed_scaling_factor", 0, 1e6),
        n_group=n_group,
        topk_group=topk_group,
        wide=True,
    )


FAMILY_V2 = Family(V2, "DeepseekV2ForCausalLM", parse_v2, MoENames(), separate)
FAMILY_V3 = Family(V3, "DeepseekV3ForCausalLM", parse_v3, MoENames(), separate)
