"""Mixtral: what its ``config.json`` means, what its tensors are called, and how they make a model.

H hidden, I expert intermediate, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.experts.layout import ExpertId
from duoserve.experts.packing import ExpertNames
from duoserve.experts.safetensors_header import MAX_TENSORS
from duoserve.kernels import ExpertWeights
from duoserve.models.attention import GroupedQueryAttention
from duoserve.models.config_fields import MAX_TOKEN_ID, Fields
from duoserve.models.layers import RMSNorm, Rope
from duoserve.models.moe import MoEBlock
from duoserve.models.transformer import DecoderLayer, Transformer
from duoserve.scheduling.source import ExpertSource

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The hyper-parameters of a raw ``config.json``; absent fields mean what they mean to transformers' MixtralConfig.

    ConfigError names a field that is unsupported or out of bounds.
    """
    fields = Fields(raw)
    _refuse_unsupported(fields)
    hidden = fields.integer("hidden_size", 1, 131072, 4096)
    num_heads = fields.integer("num_attention_heads", 1, 4096, 32)
    num_layers = fields.integer("num_hidden_layers", 1, 1000, 32)
    num_experts = fields.integer("num_local_experts", 1, 4096, 8)
    if 3 * num_layers * num_experts > MAX_TENSORS:
        raise fields.refusal("num_local_experts", f"with {num_layers} layers, that is more tensors than {MAX_TENSORS}")
    return ModelConfig(
        model_type=MODEL_TYPE,
        vocab_size=fields.integer("vocab_size", 1, 4 << 20, 32000),
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", 1, num_heads, 8),
        head_dim=_head_dim(fields, hidden, num_heads),
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", 1, num_experts, 2),
        expert_intermediate_size=fields.integer("intermediate_size", 1, 1 << 20, 14336),
        rms_norm_eps=fields.number("rms_norm_eps", 0, 1, 1e-5),
        rope_theta=fields.rope_theta(1e6),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, 1 << 30, 131072),
        sliding_window=fields.optional_integer("sliding_window", 1, 1 << 30),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=fields.dtype(torch.float32),
        bos_token_id=fields.optional_integer("bos_token_id", 0, MAX_TOKEN_ID, 1),
        eos_token_ids=fields.token_ids("eos_token_id", 2),
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, experts included. A tied head has no tensor of its own."""
    vocab = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab, "model.norm.weight": vocab[1:]}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = vocab
    for layer in range(config.num_layers):
        shapes |= _dense_shapes(config, f"model.layers.{layer}")
        for expert in range(config.num_experts):
            shapes |= _expert_shapes(config, ExpertId(layer, expert))
    return shapes


def expert_names(expert: ExpertId) -> ExpertNames:
    """The checkpoint's names of one expert's gate (w1), up (w3) and down (w2) projections."""
    prefix = f"model.layers.{expert.layer}.block_sparse_moe.experts.{expert.expert}"
    return ExpertNames(gate=f"{prefix}.w1.weight", up=f"{prefix}.w3.weight", down=f"{prefix}.w2.weight")


def _refuse_unsupported(fields: Fields) -> None:
    fields.absent("auto_map", "code that comes with a checkpoint is never run; remove the field to use duoserve's own")
    fields.unquantized()
    fields.choice("hidden_act", ["silu"], "silu")
    if fields.flag("attention_bias", False):
        raise fields.refusal("attention_bias", "supported: false")


def _head_dim(fields: Fields, hidden: int, num_heads: int) -> int:
    """Null or absent, the heads share the hidden size; RoPE turns pairs, so it must be even."""
    head_dim = fields.optional_integer("head_dim", 1, 1024)
    if head_dim is None and hidden % num_heads:
        raise fields.refusal("hidden_size", f"num_attention_heads ({num_heads}) must divide it if head_dim is absent")
    head_dim = head_dim or hidden // num_heads
    if head_dim % 2:
        raise fields.refusal("head_dim", f"a head has {head_dim} dimensions, but RoPE needs an even number")
    return head_dim


def _dense_shapes(config: ModelConfig, layer: str) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (queries, hidden),
        f"{layer}.self_attn.k_proj.weight": (keys, hidden),
        f"{layer}.self_attn.v_proj.weight": (keys, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, queries),
        f"{layer}.block_sparse_moe.gate.weight": (config.num_experts, hidden),
    }


def _expert_shapes(config: ModelConfig, expert: ExpertId) -> dict[str, tuple[int, ...]]:
    gate, up, down = expert_names(expert)
    wide = (config.expert_intermediate_size, config.hidden_size)
    return {gate: wide, up: wide, down: wide[::-1]}


def build(
    config: ModelConfig, read: Callable[[str], Tensor], source: ExpertSource, weights: ExpertWeights
) -> Transformer:
    """The model, its dense tensors read by checkpoint name and its experts left to ``source``."""
    embed_VH = read("model.embed_tokens.weight")
    return Transformer(
        embed_VH=embed_VH,
        rope=Rope(config.head_dim, config.rope_theta),
        layers=tuple(_layer(config, layer, read, source, weights) for layer in range(config.num_layers)),
        norm=RMSNorm(read("model.norm.weight"), config.rms_norm_eps),
        head_VH=embed_VH if config.tie_word_embeddings else read("lm_head.weight"),
    )


def _layer(
    config: ModelConfig, layer: int, read: Callable[[str], Tensor], source: ExpertSource, weights: ExpertWeights
) -> DecoderLayer:
    prefix = f"model.layers.{layer}."
    attention = GroupedQueryAttention(
        layer=layer,
        qkv_weight=torch.cat([read(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]),
        o_weight=read(f"{prefix}self_attn.o_proj.weight"),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=config.sliding_window,
    )
    experts = MoEBlock(layer, read(f"{prefix}block_sparse_moe.gate.weight"), config.top_k, source, weights)
    return DecoderLayer(
        attention_norm=RMSNorm(read(f"{prefix}input_layernorm.weight"), config.rms_norm_eps),
        attention=attention,
        ffn_norm=RMSNorm(read(f"{prefix}post_attention_layernorm.weight"), config.rms_norm_eps),
        ffn=experts,
    )
