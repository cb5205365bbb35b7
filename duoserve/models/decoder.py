"""Builds a Transformer from a model's config and its checkpoint's dense tensors, in the same way for all families.

V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

from duoserve.architecture import LatentAttentionConfig
from duoserve.config import ModelConfig
from duoserve.kernels import ExpertWeights
from duoserve.models.attention import GroupedQueryAttention
from duoserve.models.layers import FeedForward, RMSNorm
from duoserve.models.mla import LatentAttention
from duoserve.models.moe import MoEBlock, load_clamped, load_shared
from duoserve.models.rope import Rope
from duoserve.models.router import Router
from duoserve.models.tensors import Tensors
from duoserve.models.transformer import Attention, DecoderLayer, Transformer
from duoserve.scheduling.source import ExpertSource


class MoENames(NamedTuple):
    """A family's names in its checkpoints for a layer's feed-forward ``block``, and for parts of it."""

    block: str = "mlp"
    router: str = "gate"
    shared: str = "shared_experts"


class RoutedExperts(NamedTuple):
    """The ``source`` of routed experts, and the ``weights`` in the slots, which kernels read."""

    source: ExpertSource
    weights: ExpertWeights


def load_decoder(config: ModelConfig, names: MoENames, tensors: Tensors, experts: RoutedExperts) -> Transformer:
    """The model, with its dense weights read from ``tensors``."""
    model = tensors.under("model")
    vocab = (config.vocab_size, config.hidden_size)
    embed_VH = model("embed_tokens.weight", *vocab)
    return Transformer(
        embed_VH=embed_VH,
        rope=Rope.of(config.blocks.rope, embed_VH.device),
        layers=tuple(_layer(config, layer, names, model, experts) for layer in range(config.num_layers)),
        norm=_norm(config, model.under("norm")),
        head_VH=embed_VH if config.tie_word_embeddings else tensors("lm_head.weight", *vocab),
        multipliers=config.blocks.multipliers,
    )


def _layer(config: ModelConfig, layer: int, names: MoENames, model: Tensors, experts: RoutedExperts) -> DecoderLayer:
    tensors = model.under(f"layers.{layer}")
    block = tensors.under(names.block)
    is_moe = layer in config.blocks.moe.layers
    return DecoderLayer(
        attention_norm=_norm(config, tensors.under("input_layernorm")),
        attention=_attention(config, layer, tensors.under("self_attn")),
        ffn_norm=_norm(config, tensors.under("post_attention_layernorm")),
        ffn=_moe(config, layer, names, block, experts) if is_moe else _dense(config, block),
        multiplier=config.blocks.multipliers.residual,
    )


def _norm(config: ModelConfig, tensors: Tensors) -> RMSNorm:
    return RMSNorm.load(tensors, config.hidden_size, config.rms_norm_eps)


def _attention(config: ModelConfig, layer: int, tensors: Tensors) -> Attention:
    attention = config.blocks.attention
    if isinstance(attention, LatentAttentionConfig):
        return LatentAttention.load(layer, attention, config.blocks.rope.interleaved, config.hidden_size, tensors)
    return GroupedQueryAttention.load(layer, attention, config.hidden_size, config.rms_norm_eps, tensors)


def _dense(config: ModelConfig, block: Tensors) -> FeedForward:
    return FeedForward.load(block, config.hidden_size, config.blocks.moe.dense_intermediate_size)


def _moe(config: ModelConfig, layer: int, names: MoENames, block: Tensors, experts: RoutedExperts) -> MoEBlock:
    moe, hidden = config.blocks.moe, config.hidden_size
    sizes = (config.num_experts, hidden, moe.expert_intermediate_size)
    return MoEBlock(
        layer=layer,
        router=Router.load(moe.router, hidden, block.under(names.router)),
        source=experts.source,
        weights=experts.weights,
        shared=load_shared(moe.shared, hidden, block, names.shared) if moe.shared else None,
        clamped=load_clamped(moe.clamp, *sizes, block.under("experts")) if moe.clamp else None,
    )
