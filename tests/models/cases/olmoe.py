"""OLMoE: norms of whole projections, clipped queries, keys and values."""

from __future__ import annotations

from tests.models.cases.case import Case, FamilyCases

CASES = FamilyCases(
    model_type="olmoe",
    base={"num_experts": 8, "num_experts_per_tok": 3},
    cases={
        "plain": Case(),
        "clipped": Case({"clip_qkv": 0.5}),
        "grouped_renormalized_hub": Case({"num_key_value_heads": 2, "norm_topk_prob": True}, hub=True),
        "biases_clipped_tied": Case({"attention_bias": True, "clip_qkv": 1.0, "tie_word_embeddings": True}),
        "top_1_many_shards": Case({"num_experts_per_tok": 1, "intermediate_size": 11}, shard="20KB"),
    },
    hard="clipped",
    top_k=3,
    experts=24,
    refused={
        "clip zero": ({"clip_qkv": 0.0}, r"clip_qkv is 0\.0; it must be a number above 0"),
        "head_dim": ({"head_dim": 16}, "head_dim is 16; supported: null"),
        "window": ({"sliding_window": 9}, "sliding_window is 9; supported: null"),
        "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'; supported: 'default'"),
        "partial rotary": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; supported: 1\.0"),
    },
)
