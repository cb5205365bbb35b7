"""A variant of a model whose routers report what they choose."""

from __future__ import annotations

from dataclasses import replace

from duoserve.models.moe import MoEBlock
from duoserve.models.tap import RouterSite, RoutingTap
from duoserve.models.transformer import DecoderLayer, Transformer
from duoserve.scheduling.routing import RoutingListener


def listened_to(model: Transformer, listener: RoutingListener) -> tuple[Transformer, RoutingTap]:
    """A variant of ``model`` (all tensors shared) with a tap at every MoE layer, and that tap.

    Whoever runs passes must tell the tap of each before it begins.
    """
    sites = [
        RouterSite(layer.ffn.layer, layer.ffn.router.logits, layer.ffn_norm.weight_H)
        for layer in model.layers
        if isinstance(layer.ffn, MoEBlock)
    ]
    tap = RoutingTap(listener, sites)
    return replace(model, layers=tuple(_tapped(layer, tap) for layer in model.layers)), tap


def _tapped(layer: DecoderLayer, tap: RoutingTap) -> DecoderLayer:
    return replace(layer, ffn=replace(layer.ffn, tap=tap)) if isinstance(layer.ffn, MoEBlock) else layer
