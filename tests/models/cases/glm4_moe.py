"""GLM-4.x-MoE: half of a head is rotated, norms of queries and keys on request, DeepSeek-V3's router."""

from __future__ import annotations

from tests.models.cases.case import Case, FamilyCases

CASES = FamilyCases(
    model_type="glm4_moe",
    base={
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
    },
    cases={
        "plain": Case(),
        "norms_biases_hub_mtp": Case(
            {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5}, hub=True, mtp=True
        ),
        "groups_not_renormalized": Case({"n_group": 2, "topk_group": 1, "norm_topk_prob": False}),
        "quarter_rotary_two_shared": Case(
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                "n_shared_experts": 2,
            }
        ),
        "all_sparse_tied_shards": Case({"first_k_dense_replace": 0, "tie_word_embeddings": True}, shard="20KB"),
        "yarn": Case(
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "partial_rotary_factor": 0.5,
                }
            }
        ),
    },
    hard="norms_biases_hub_mtp",
    top_k=3,
    experts=16,
    refused={
        "moe_layer_freq": ({"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
        "scoring": ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: 'sigmoid'"),
        "rope type": ({"rope_scaling": {"type": "dynamic"}}, "type is 'dynamic'; supported: 'default', 'yarn'"),
        "odd rotary": ({"head_dim": 6, "partial_rotary_factor": 0.5}, "a head has 3 dimensions to turn"),
        "norm no flag": ({"use_qk_norm": None}, "use_qk_norm is None; it must be true or false"),
    },
)
