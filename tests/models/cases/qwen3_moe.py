"""Qwen3-MoE: norms of queries and keys per head, biases, dense layers between the others."""

from __future__ import annotations

from tests.models.cases.case import Case, FamilyCases

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = FamilyCases(
    model_type="qwen3_moe",
    base={
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 12,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    cases={
        "plain": Case(),
        "not_renormalized_own_head_dim": Case({"norm_topk_prob": False, "head_dim": 12}),
        "biases_tied": Case({"attention_bias": True, "tie_word_embeddings": True}),
        "sparse_step_hub": Case(
            {"decoder_sparse_step": 2, "num_hidden_layers": 5},
            hub=True,
            hub_names={"num_local_experts": "num_experts"},
        ),
        "dense_first_and_last": Case({"mlp_only_layers": [0, 3], "num_hidden_layers": 4}),
        "sliding_window": Case({"use_sliding_window": True, "sliding_window": 9}),
        "window_not_used_many_shards": Case({"sliding_window": 9}, shard="20KB"),
        "yarn": Case({"rope_parameters": YARN}),
        "yarn_hub": Case({"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}}, hub=True),
    },
    hard="dense_first_and_last",
    top_k=3,
    experts=16,
    refused={
        "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        "llama3 rope": (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters: rope_type is 'llama3'; supported: 'default', 'yarn'",
        ),
        "dynamic rope on the hub": ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling: type is 'dynamic'"),
        "yarn without factor": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is absent; it must be"),
        "yarn on a base of one": (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1.0}},
            r"rope_scaling: rope_theta is 1\.0; with YaRN it must be above 1",
        ),
        "yarn without a magnitude": (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0.0}},
            r"rope_scaling: attention_factor is 0\.0; it must be a number above 0",
        ),
        "yarn of hardly any turns": (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 1e-310}},
            "rope_scaling: beta_slow is 1e-310; it must be a number above 1e-06",
        ),
        "no layer has experts": ({"decoder_sparse_step": 9}, "with decoder_sparse_step 9, no layer has experts"),
        "layers no list": ({"mlp_only_layers": 1}, "mlp_only_layers is 1; it must be a list of integers in 0"),
        "two counts": ({"num_experts": 4}, "num_local_experts is 8; but num_experts, its other name, is 4"),
        "quantized": (
            {"quantization_config": {"quant_method": "hqq"}},
            "quant_method is 'hqq'; supported: 'awq', 'fp8'",
        ),
    },
)
