"""How a decode step brings its experts: few are wanted, and most of those should still be in their slots."""

from __future__ import annotations

from duoserve.scheduling.plan import NO_GUESSES, DecodeFetch, Guesses, LayerPlan, LayerView, ModelShape


def plan_decode(mode: DecodeFetch, view: LayerView, shape: ModelShape, guesses: Guesses = NO_GUESSES) -> LayerPlan:
    """What to copy, and what to copy ahead of its routing, once a layer of a decode step has been routed.

    ``guesses`` are those of earlier layers, whose copies have been asked for.
    """
    if mode is DecodeFetch.NEXT_LAYER:
        ahead = next_layers(view.layer, shape, 1)
        return LayerPlan(view.layer, view.demand(), tuple(view.absent(shape.experts(ahead))), ahead=ahead)
    overlap = mode is not DecodeFetch.ON_DEMAND
    return LayerPlan(view.layer, view.demand(), ahead=guesses.ahead, overlap=overlap, spared=guesses.spared)


def next_layers(layer: int, shape: ModelShape, count: int) -> tuple[int, ...]:
    """The ``count`` layers behind ``layer``; behind the last comes the first, for the next token is on its way."""
    following = shape.after(layer)
    return tuple(other for other in (following + shape.layers)[:count] if other != layer)
