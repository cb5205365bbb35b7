"""A forward pass in parts: each goes from the experts of one layer to the router's choice in the next.

T new tokens, E experts, L layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from duoserve.models.batch import Batch
from duoserve.models.moe import MoEBlock, Routed
from duoserve.models.transformer import Transformer


class PassFrame(NamedTuple):
    """What all parts share; ``slots_LE`` (int32) says where the experts are, if the device is to know."""

    model: Transformer
    batch: Batch
    rope: tuple[Tensor, Tensor]
    slots_LE: Tensor | None


class PartEnd(NamedTuple):
    """Where a part ends: ``block`` has chosen its experts, which are to be computed before the next part begins."""

    block: MoEBlock
    routed: Routed
    at: int  # the place of the block's layer in the model
    x_TH: Tensor
    frame: PassFrame


def moe_blocks(model: Transformer) -> list[MoEBlock]:
    """The blocks of the layers that have experts, in order."""
    return [layer.ffn for layer in model.layers if isinstance(layer.ffn, MoEBlock)]


def first_part(model: Transformer, batch: Batch, slots_LE: Tensor | None = None) -> PartEnd | Tensor:
    """From the tokens to the first choice, or to the logits [T, V] of a model without one."""
    x_TH, rope = model.embed(batch)
    return _go_on(PassFrame(model, batch, rope, slots_LE), 0, None, x_TH)


def next_part(end: PartEnd) -> PartEnd | Tensor:
    """From the chosen experts, all computed, to the next choice; behind the last one to the float32 logits [T, V]."""
    block, routed, layer = end.block, end.routed, end.frame.model.layers[end.at]
    delta_TH = layer.added(block.combine(routed, block.share(routed)))
    return _go_on(end.frame, end.at + 1, delta_TH, end.x_TH)


def _go_on(frame: PassFrame, first: int, delta_TH: Tensor | None, x_TH: Tensor) -> PartEnd | Tensor:
    for at, layer in enumerate(frame.model.layers[first:], first):
        normed_TH, x_TH = layer.attend(delta_TH, x_TH, frame.rope, frame.batch)
        if isinstance(layer.ffn, MoEBlock):
            slots_E = None if frame.slots_LE is None else frame.slots_LE[layer.ffn.layer]
            return PartEnd(layer.ffn, layer.ffn.route(normed_TH, slots_E), at, x_TH, frame)
        delta_TH = layer.added(layer.ffn(normed_TH))
    return frame.model.logits(delta_TH, x_TH)
