"""A variant of a model whose routers report what they choose."""

from __future__ import annotations

from duoserve.models.moe import MoEBlock
from duoserve.models.tap import RouterSite, RoutingTap
from duoserve.models.transformer import Transformer
from duoserve.models.variants import with_tap
from duoserve.scheduling.routing import RoutingListener


def listened_to(model: Transformer, listener: RoutingListener | None) -> tuple[Transformer, RoutingTap | None]:
    """A variant of ``model`` (all tensors shared) with a tap at every MoE layer, and that tap.

    The caller must tell the tap of each pass before it begins. Without a listener, gives the model itself and None.
    """
    if listener is None:
        return model, None
    sites = [
        RouterSite(layer.ffn.layer, layer.ffn.router.logits, layer.ffn_norm.weight_H)
        for layer in model.layers
        if isinstance(layer.ffn, MoEBlock)
    ]
    tap = RoutingTap(listener, sites)
    return with_tap(model, tap), tap
