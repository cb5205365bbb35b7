"""A model whose routers are listened to."""

from __future__ import annotations

from dataclasses import replace

from duoserve.models.moe import MoEBlock
from duoserve.models.tap import RouterSite, RoutingTap
from duoserve.models.transformer import DecoderLayer, Transformer
from duoserve.scheduling.routing import RoutingListener


def listened_to(model: Transformer, listener: RoutingListener) -> tuple[Transformer, RoutingTap]:
    """The same model (all tensors shared) with a tap at every MoE layer; the engine tells the tap of every pass."""
    sites = [
        RouterSite(layer.ffn.layer, layer.ffn.router.logits, layer.ffn_norm.weight_H)
        for layer in model.layers
        if isinstance(layer.ffn, MoEBlock)
    ]
    tap = RoutingTap(listener, sites)
    return replace(model, layers=tuple(_tapped(layer, tap) for layer in model.layers)), tap


def _tapped(layer: DecoderLayer, tap: RoutingTap) -> DecoderLayer:
    return replace(layer, ffn=replace(layer.ffn, tap=tap)) if isinstance(layer.ffn, MoEBlock) else layer
