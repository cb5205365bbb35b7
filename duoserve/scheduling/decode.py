"""How a decode step brings its experts: few are wanted, and most of those should still be in their slots."""

from __future__ import annotations

from duoserve.scheduling.plan import DecodeMode, LayerPlan, LayerView, ModelShape


def plan_decode(mode: DecodeMode, view: LayerView, shape: ModelShape) -> LayerPlan:
    """What to copy, and what to copy ahead of its routing, once a layer of a decode step has been routed."""
    if mode is DecodeMode.NEXT_LAYER:
        ahead = _next_layer(view.layer, shape)
        return LayerPlan(view.layer, view.demand(), tuple(view.absent(shape.experts(ahead))), ahead=ahead)
    return LayerPlan(view.layer, view.demand(), overlap=mode is not DecodeMode.ON_DEMAND)


def _next_layer(layer: int, shape: ModelShape) -> tuple[int, ...]:
    """The layer behind ``layer``; behind the last comes the first, for the next token is on its way."""
    following = shape.after(layer) or shape.layers
    return tuple(other for other in following[:1] if other != layer)
