"""Mixtral's config.json: both dialects, the defaults of transformers, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, MixtralConfig

from duoserve.architecture import AttentionConfig, Blocks, MoEConfig, RopeConfig, RouterConfig
from duoserve.config import ModelConfig
from duoserve.errors import ConfigError
from duoserve.experts.layout import ExpertId
from duoserve.models.mixtral import FAMILY, parse_config
from duoserve.models.registry import family_of
from tests.helpers.checkpoints import SMALL, save_mixtral, to_hub_dialect

# mistralai/Mixtral-8x7B-v0.1 as it is on the hub
HUB = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def of_transformers(theirs: MixtralConfig) -> ModelConfig:
    """What transformers' config object says, in our words."""
    eos = theirs.eos_token_id
    head_dim = theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads
    layers = range(theirs.num_hidden_layers)
    return ModelConfig(
        model_type="mixtral",
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        rms_norm_eps=theirs.rms_norm_eps,
        max_position_embeddings=theirs.max_position_embeddings,
        tie_word_embeddings=theirs.tie_word_embeddings,
        dtype=theirs.dtype or torch.bfloat16,
        bos_token_id=theirs.bos_token_id,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        blocks=Blocks(
            attention=AttentionConfig(
                num_heads=theirs.num_attention_heads,
                num_kv_heads=theirs.num_key_value_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                windows=tuple(theirs.sliding_window for _ in layers),
            ),
            rope=RopeConfig(head_dim, theirs.rope_parameters["rope_theta"]),
            moe=MoEConfig(
                RouterConfig(theirs.num_local_experts, theirs.num_experts_per_tok),
                theirs.intermediate_size,
                tuple(layers),
            ),
        ),
    )


ACCEPTED: dict[str, dict[str, Any]] = {
    "hub": {},
    "head_dim null": {"head_dim": None},
    "head_dim given": {"head_dim": 64},
    "multi-head": {"num_key_value_heads": 32},
    "sliding window": {"sliding_window": 4096},
    "eos list": {"eos_token_id": [2, 7]},
    "eos null": {"eos_token_id": None, "bos_token_id": None},
    "tied": {"tie_word_embeddings": True},
    "float16": {"torch_dtype": "float16"},
    "dtype before torch_dtype": {"dtype": "float32"},
    "rope_scaling null": {"rope_scaling": None},
    "rope_scaling default": {"rope_scaling": {"type": "default"}},
    "rope_scaling's theta": {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}},
    "rope_parameters' theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "rope_parameters without theta": {"rope_parameters": {"rope_type": "default"}},
    "both": {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "integer theta": {"rope_theta": 10000},
    "unknown fields": {"x": {"y": [1]}, "max_window_layers": "?"},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_config_means_what_it_means_to_transformers(case: str) -> None:
    raw = HUB | ACCEPTED[case]
    assert parse_config(json.loads(json.dumps(raw))) == of_transformers(AutoConfig.for_model(**raw))


def test_absent_fields_are_what_they_are_to_transformers() -> None:
    assert parse_config({"model_type": "mixtral"}) == of_transformers(MixtralConfig())


def test_both_dialects_of_a_saved_checkpoint_are_read_alike(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path, dtype=torch.bfloat16)
    new = json.loads((folder / "config.json").read_text())
    old = json.loads((to_hub_dialect(folder) / "config.json").read_text())
    assert "rope_parameters" in new and "rope_theta" in old and "dtype" not in old
    assert parse_config(new) == parse_config(old) == of_transformers(MixtralConfig(**SMALL, dtype="bfloat16"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    "activation no text": ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]; supported: 'silu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True; supported: false"),
    "attention bias no bool": ({"attention_bias": 0}, "attention_bias is 0; it must be true or false"),
    "quantized": (
        {"quantization_config": {"a": 1, "b": 2, "bits": 4, "group_size": 128, "quant_method": "awq"}},
        "quantization_config: a is 1; what it says of the weights is not known here",
    ),
    "quantized somehow": (
        {"quantization_config": {}},
        "quantization_config: quant_method is absent; supported: 'awq', 'fp8', 'gptq'",
    ),
    "no layers": ({"num_hidden_layers": 0}, r"num_hidden_layers is 0; it must be an integer in 1\.\.1000"),
    "ten million layers": ({"num_hidden_layers": 10_000_000}, r"num_hidden_layers is 10000000; .* 1\.\.1000"),
    "wide": ({"hidden_size": 131073}, r"hidden_size is 131073; it must be an integer in 1\.\.131072"),
    "huge": ({"hidden_size": 10**400}, r"hidden_size is 1000000.*; it must be an integer in"),
    "bool": ({"hidden_size": True}, r"hidden_size is True; it must be an integer in"),
    "float": ({"hidden_size": 64.0}, r"hidden_size is 64\.0; it must be an integer in"),
    "text": ({"hidden_size": "64"}, r"hidden_size is '64'; it must be an integer in"),
    "null": ({"hidden_size": None}, r"hidden_size is None; it must be an integer in"),
    "vocabulary": ({"vocab_size": 4194305}, r"vocab_size is 4194305; it must be an integer in 1\.\.4194304"),
    "width": ({"intermediate_size": 0}, r"intermediate_size is 0; it must be an integer in 1\.\.1048576"),
    "context": ({"max_position_embeddings": -1}, r"max_position_embeddings is -1; it must be an integer in 1\.\."),
    "window": ({"sliding_window": 0}, r"sliding_window is 0; it must be an integer in 1\.\."),
    "no heads": ({"num_attention_heads": 0}, r"num_attention_heads is 0; it must be an integer in 1\.\.4096"),
    "more KV heads": ({"num_key_value_heads": 33}, r"num_key_value_heads is 33; it must be an integer in 1\.\.32"),
    "uneven KV heads": ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 KV heads evenly"),
    "uneven heads": ({"num_attention_heads": 24}, r"hidden_size is 4096; num_attention_heads \(24\) must divide it"),
    "odd heads": ({"head_dim": 33}, "head_dim is 33; a head has 33 dimensions to turn, but RoPE needs an even number"),
    "odd heads by division": ({"hidden_size": 96}, "head_dim is absent; a head has 3 dimensions to turn"),
    "no experts": ({"num_local_experts": 0}, r"num_local_experts is 0; it must be an integer in 1\.\.4096"),
    "experts in all": ({"num_local_experts": 4096}, "num_local_experts is 4096; with 32 layers, that is more tensors"),
    "top_k 0": ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0; it must be an integer in 1\.\.8"),
    "top_k over E": ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9; it must be an integer in 1\.\.8"),
    "eps NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number above 0 and up to 1"),
    "eps infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a number above 0"),
    "eps 0": ({"rms_norm_eps": 0.0}, r"rms_norm_eps is 0\.0; it must be a number above 0"),
    "eps bool": ({"rms_norm_eps": True}, "rms_norm_eps is True; it must be a number above 0"),
    "theta negative": ({"rope_theta": -1.0}, r"rope_theta is -1\.0; it must be a number above 0"),
    "theta NaN inside": (
        {"rope_parameters": {"rope_theta": float("nan")}},
        "config.json: rope_parameters: rope_theta is nan; it must be a number above 0",
    ),
    "longrope": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}},
        "rope_parameters: rope_type is 'longrope'; supported: 'default', 'yarn'",
    ),
    "linear, old": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type is 'linear'; supported"),
    "rope_type before type": ({"rope_scaling": {"type": "default", "rope_type": "llama3"}}, "rope_type is 'llama3'"),
    "rope per layer type": ({"rope_parameters": {"full_attention": {}}}, "one flat object for all layers"),
    "rope no object": ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; supported: null, or one flat object"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; supported: 1\.0"),
    "partial rotary inside": ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling: partial_rotary_factor"),
    "float64": ({"torch_dtype": "float64"}, "torch_dtype is 'float64'; supported: bfloat16, float16, float32"),
    "dtype no text": ({"dtype": ["float16"]}, r"dtype is \['float16'\]; supported: bfloat16"),
    "tie no bool": ({"tie_word_embeddings": None}, "tie_word_embeddings is None; it must be true or false"),
    "negative bos": ({"bos_token_id": -1}, r"bos_token_id is -1; it must be an integer in 0\.\."),
    "eos no id": ({"eos_token_id": [2, "3"]}, r"eos_token_id is \[2, '3'\]; it must be a token id in 0\.\."),
    "eos bool": ({"eos_token_id": True}, r"eos_token_id is True; it must be a token id in 0\.\."),
    "eos too many": ({"eos_token_id": [1] * 1001}, r"eos_token_id is \[1, 1.*; it must be a token id in 0\.\."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unsupported_is_refused_by_name(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        parse_config(HUB | changes)


VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 10**30, 0.5, float("nan"), float("inf"), "", "silu", [], {}]),
    st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", "quant_method"]), st.floats() | st.text()),
)
NAMES = [*HUB, "rope_scaling", "rope_parameters", "partial_rotary_factor", "head_dim", "dtype"]


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_config_is_read_or_refused(changes: dict[str, Any]) -> None:
    raw = HUB | changes
    try:
        config = family_of(raw).parse_config(raw)
    except ConfigError:
        return
    assert 1 <= config.top_k <= config.num_experts
    assert 0 < config.rms_norm_eps <= 1


def test_tensor_shapes_of_a_hand_counted_model() -> None:
    raw = HUB | {"num_hidden_layers": 2, "num_local_experts": 3, "head_dim": 64}
    shapes = FAMILY.tensor_shapes(parse_config(raw))
    assert len(shapes) == 3 + 2 * (7 + 3 * 3)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (32000, 4096)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (2048, 4096)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (512, 4096)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (4096, 2048)
    assert shapes["model.layers.1.block_sparse_moe.gate.weight"] == (3, 4096)
    pieces = FAMILY.expert_pieces(parse_config(raw), ExpertId(1, 2))
    assert [shapes[piece.name] for piece in pieces] == [(14336, 4096), (14336, 4096), (4096, 14336)]
    assert "lm_head.weight" not in FAMILY.tensor_shapes(parse_config(raw | {"tie_word_embeddings": True}))


def test_expert_names_are_those_of_the_hub() -> None:
    prefix = "model.layers.4.block_sparse_moe.experts.7."
    names = [piece.name for piece in FAMILY.expert_pieces(parse_config(HUB), ExpertId(4, 7))]
    assert names == [f"{prefix}w1.weight", f"{prefix}w3.weight", f"{prefix}w2.weight"]
