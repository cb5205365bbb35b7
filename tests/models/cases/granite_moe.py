"""Granite-MoE: fused expert tensors, multipliers of embeddings, scores, residuals and logits."""

from __future__ import annotations

from tests.models.cases.case import Case, FamilyCases

MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}

CASES = FamilyCases(
    model_type="granitemoe",
    base={"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 3},
    cases={
        "plain": Case({"attention_multiplier": 0.35}),
        "multipliers": Case(MULTIPLIERS),
        "multipliers_hub_tied": Case(MULTIPLIERS | {"tie_word_embeddings": True, "num_key_value_heads": 4}, hub=True),
        "biases_shards": Case(MULTIPLIERS | {"attention_bias": True}, shard="20KB"),
        "top_1_odd_width": Case({"num_experts_per_tok": 1, "intermediate_size": 11}),
    },
    hard="multipliers",
    top_k=3,
    experts=24,
    refused={
        "no multiplier": ({"residual_multiplier": None}, "residual_multiplier is None; it must be a number above 0"),
        "logits by nothing": ({"logits_scaling": 0}, "logits_scaling is 0; it must be a number above 0"),
        "rope type": ({"rope_scaling": {"type": "linear"}}, "type is 'linear'; supported: 'default', 'yarn'"),
        "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    },
)
