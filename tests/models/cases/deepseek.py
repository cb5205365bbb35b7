"""DeepSeek: latent attention, dense first layers, shared experts, groups of experts, YaRN that scales the scores."""

from __future__ import annotations

from typing import Any

from tests.models.cases.case import Case, FamilyCases

LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}
LOPSIDED = YARN | {"mscale": 1.2, "mscale_all_dim": 0.8}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "moe_layer_freq": ({"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
    "rope type": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "type is 'linear'; supported: 'default', 'yarn'",
    ),
    "all dense": ({"first_k_dense_replace": 3}, r"first_k_dense_replace is 3; it must be an integer in 0\.\.2"),
    "grouped keys": (
        {"num_key_value_heads": 2},
        "num_key_value_heads is 2; latent attention has one for each of the 4",
    ),
    "odd rope": ({"qk_rope_head_dim": 5}, "5 dimensions to turn, but RoPE needs an even number"),
    "remote code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is .*code that comes with a checkpoint is never run"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
}

V2 = FamilyCases(
    model_type="deepseek_v2",
    base=LATENT,
    cases={
        "plain": Case({"routed_scaling_factor": 1.5}),
        "groups_yarn": Case(GROUPS | {"routed_scaling_factor": 16.0, "rope_parameters": YARN}),
        "lite_hub": Case({"q_lora_rank": None, "rope_parameters": YARN}, hub=True),
        "biases_tied_shards": Case({"attention_bias": True, "tie_word_embeddings": True}, shard="20KB"),
        "no_dense_layer_wide_values": Case({"first_k_dense_replace": 0, "v_head_dim": 16}),
        "lopsided_yarn": Case({"rope_parameters": LOPSIDED}),
    },
    hard="groups_yarn",
    top_k=3,
    experts=16,
    refused=REFUSED
    | {
        "scoring": ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; supported: 'softmax'"),
        "method": (
            {"topk_method": "noaux_tc"},
            "topk_method is 'noaux_tc'; supported: 'greedy', 'group_limited_greedy'",
        ),
        "renormalized": ({"norm_topk_prob": True}, "norm_topk_prob is True; supported: false"),
        "uneven groups": (GROUPS | {"n_group": 3}, "n_group is 3; 8 experts must form equal groups of at least 1"),
        "groups too small": (
            GROUPS | {"topk_group": 1},
            "topk_group is 1; 3 experts are to be chosen from groups of 2",
        ),
        "dense biases": ({"mlp_bias": True}, "mlp_bias is True; supported: false"),
    },
)

V3 = FamilyCases(
    model_type="deepseek_v3",
    base=LATENT | {"num_key_value_heads": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    cases={
        "plain": Case(),
        "yarn_hub_mtp": Case({"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, hub=True, mtp=True),
        "one_group_not_renormalized": Case({"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
        "no_query_rank_half_split": Case({"q_lora_rank": None, "rope_interleave": False}),
        "biases_tied_shards": Case(
            {"attention_bias": True, "tie_word_embeddings": True, "num_nextn_predict_layers": 0}, shard="20KB"
        ),
        "two_dense_layers": Case(
            {"first_k_dense_replace": 2, "num_hidden_layers": 4, "routed_scaling_factor": 1.0, "rms_norm_eps": 0.01}
        ),
    },
    hard="yarn_hub_mtp",
    top_k=3,
    experts=16,
    refused=REFUSED
    | {
        "scoring": ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: 'sigmoid'"),
        "method": ({"topk_method": "greedy"}, "topk_method is 'greedy'; supported: 'noaux_tc'"),
        "group of one": (
            {"n_group": 8, "topk_group": 4},
            "n_group is 8; 8 experts must form equal groups of at least 2",
        ),
        "int8": (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method is 'bitsandbytes'; supported",
        ),
        "head_dim null": ({"head_dim": None}, "head_dim is None; it must be absent or qk_rope_head_dim, 4"),
        "head_dim of the whole head": ({"head_dim": 12}, "head_dim is 12; it must be absent or qk_rope_head_dim, 4"),
        "no shared expert": ({"n_shared_experts": 0}, r"n_shared_experts is 0; it must be an integer in 1\.\."),
    },
)
