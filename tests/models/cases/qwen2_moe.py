"""Qwen2-MoE: a gated shared expert, biases of queries, keys and values, windows of some layers."""

from __future__ import annotations

from tests.models.cases.case import Case, FamilyCases

CASES = FamilyCases(
    model_type="qwen2_moe",
    base={
        "num_key_value_heads": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    cases={
        "plain": Case(),
        "renormalized_hub": Case({"norm_topk_prob": True, "rope_parameters": {"rope_theta": 1e6}}, hub=True),
        "no_biases_tied": Case({"qkv_bias": False, "tie_word_embeddings": True}),
        "sparse_step": Case({"decoder_sparse_step": 2, "num_hidden_layers": 4}),
        "dense_last": Case({"mlp_only_layers": [2]}),
        "windows_below_a_layer": Case(
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "num_hidden_layers": 4}
        ),
        "windows_by_type_shards": Case(
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
            shard="20KB",
        ),
    },
    hard="sparse_step",
    top_k=3,
    experts=16,
    refused={
        "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        "sliding without a window": (
            {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
            "use_sliding_window is False; layer_types has layers that slide, so it must be true",
        ),
        "sliding without a number": (
            {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": None},
            "sliding_window is None; layers slide, so it must be a number of positions",
        ),
        "unknown layer type": (
            {"layer_types": ["chunked_attention"] * 3},
            r"layer_types is \['chunked_.*; it must be a list of 3, each 'full_attention' or 'sliding_attention'",
        ),
        "a layer type too few": ({"layer_types": ["full_attention"] * 2}, "it must be a list of 3"),
        "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'; supported: 'default'"),
        "bias no flag": ({"qkv_bias": 1}, "qkv_bias is 1; it must be true or false"),
    },
)
