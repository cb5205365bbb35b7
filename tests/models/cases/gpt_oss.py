"""gpt-oss: sinks, windows of every other layer, biases everywhere, clamped experts in fused, transposed tensors."""

from __future__ import annotations

from tests.models.cases.case import Case, FamilyCases

CASES = FamilyCases(
    model_type="gpt_oss",
    base={
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 7,
        "swiglu_limit": 0.5,  # low enough to be reached
    },
    cases={
        "plain": Case(),
        "no_rope_scaling_hub": Case({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, hub=True),
        "yarn_truncated_hub": Case(
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 150000.0,
                    "factor": 4.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": True,
                    "original_max_position_embeddings": 64,
                }
            },
            hub=True,
        ),
        "no_biases_tied": Case({"attention_bias": False, "tie_word_embeddings": True}),
        "windows_by_type_shards": Case(
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, shard="20KB"
        ),
        "other_activation_odd_width": Case({"swiglu_alpha": 1.1, "swiglu_limit": 7.0, "intermediate_size": 11}),
    },
    hard="plain",
    top_k=3,
    experts=24,
    refused={
        "awq": ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'; supported: 'mxfp4'"),
        "no limit": ({"swiglu_limit": None}, "swiglu_limit is None; it must be a number above 0"),
        "no window": ({"sliding_window": None}, "sliding_window is None; layers slide, so it must be a number"),
        "rope type": ({"rope_scaling": {"type": "llama3"}}, "type is 'llama3'; supported: 'default', 'yarn'"),
        "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    },
)
