"""Configs as published models have them: as many parameters as their authors say."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from duoserve.kv_cache import kv_bytes_per_token
from duoserve.models.registry import family_of

# What of a config.json decides sizes and is not the family's default, and the parameters in billions.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Mixtral-8x7B": ({"model_type": "mixtral"}, 46.7),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        30.5,
    ),
    "Qwen1.5-MoE-A2.7B": ({"model_type": "qwen2_moe"}, 14.3),
    "OLMoE-1B-7B": ({"model_type": "olmoe", "intermediate_size": 1024}, 6.9),
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
        },
        15.7,
    ),
    "DeepSeek-V2": (
        {
            "model_type": "deepseek_v2",
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
        },
        236,
    ),
    "DeepSeek-V3": ({"model_type": "deepseek_v3"}, 671),
    "GLM-4.5-Air": ({"model_type": "glm4_moe", "head_dim": 128, "attention_bias": True}, 106),
    "granite-3.0-1b-a400m": (
        {
            "model_type": "granitemoe",
            "vocab_size": 49155,
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": True,
        },
        1.3,
    ),
    "gpt-oss-20b": ({"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}, 20.9),
    "gpt-oss-120b": ({"model_type": "gpt_oss"}, 116.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    raw, billions = PUBLISHED[name]
    family = family_of(raw)
    shapes = family.tensor_shapes(family.parse_config(raw))
    assert sum(map(prod, shapes.values())) / 1e9 == pytest.approx(billions, rel=0.01, abs=0.05)


def test_latent_attention_keeps_576_numbers_a_token_and_layer() -> None:
    raw = {"model_type": "deepseek_v3"}
    config = family_of(raw).parse_config(raw)
    assert kv_bytes_per_token(config, config.dtype) == 61 * 576 * config.dtype.itemsize
