"""A forward pass in parts: each goes from the experts of one layer to the router's choice in the next.

T new tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from duoserve.models.batch import Batch
from duoserve.models.moe import MoEBlock, Routed
from duoserve.models.transformer import Transformer


class Choice(NamedTuple):
    """Where a part ends: ``block`` has chosen its experts, which are to be computed before the next part begins."""

    block: MoEBlock
    routed: Routed
    layer: int  # the index of the block's layer in the model
    x_TH: Tensor
    rope: tuple[Tensor, Tensor]
    batch: Batch


def first_part(model: Transformer, batch: Batch) -> Choice | Tensor:
    """From the tokens to the first choice, or to the logits [T, V] of a model without one."""
    x_TH, rope = model.embed(batch)
    return _go_on(model, batch, rope, 0, (None, x_TH))


def next_part(model: Transformer, choice: Choice) -> Choice | Tensor:
    """From the chosen experts, all computed, to the next choice; behind the last one to the float32 logits [T, V]."""
    delta_TH = choice.block.combine(choice.routed)
    return _go_on(model, choice.batch, choice.rope, choice.layer + 1, (delta_TH, choice.x_TH))


def _go_on(
    model: Transformer,
    batch: Batch,
    rope: tuple[Tensor, Tensor],
    first: int,
    residual: tuple[Tensor | None, Tensor],
) -> Choice | Tensor:
    delta_TH, x_TH = residual
    for index, layer in enumerate(model.layers[first:], first):
        normed_TH, x_TH = layer.attend(delta_TH, x_TH, rope, batch)
        if isinstance(layer.ffn, MoEBlock):
            return Choice(layer.ffn, layer.ffn.route(normed_TH), index, x_TH, rope, batch)
        delta_TH = layer.ffn(normed_TH)
    return model.logits(delta_TH, x_TH)
