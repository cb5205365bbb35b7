"""The decoder that every family builds: embedding, layers of attention and experts, norm, head.

T new tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.architecture import NO_MULTIPLIERS, Multipliers
from duoserve.kernels import Products
from duoserve.models.batch import Batch
from duoserve.models.layers import RMSNorm
from duoserve.models.rope import Rope

Attention = Callable[[Tensor, tuple[Tensor, Tensor], Batch], Tensor]
FeedForward = Callable[[Tensor], Tensor]

# Rows of logits that are made at a time: all of a long prompt's would take more memory than its activations.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm residual layer: attention, then the experts (or a dense feed-forward), each times ``multiplier``."""

    attention_norm: RMSNorm
    attention: Attention
    ffn_norm: RMSNorm
    ffn: FeedForward
    multiplier: float = 1.0

    def __call__(
        self, delta_TH: Tensor | None, x_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Takes and gives the residual in two parts, ``delta + x``: the next norm adds them, in one op with itself."""
        normed_TH, x_TH = self.attend(delta_TH, x_TH, rope, batch)
        return self.added(self.ffn(normed_TH)), x_TH

    def attend(
        self, delta_TH: Tensor | None, x_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The part before ``ffn``: what that takes, and the residual ``x``."""
        normed_TH, x_TH = self.attention_norm.after_adding(delta_TH, x_TH)
        attended_TH = self.added(self.attention(normed_TH, rope, batch))
        return self.ffn_norm.after_adding(attended_TH, x_TH)

    def added(self, output_TH: Tensor) -> Tensor:
        """What an output of ``attention`` or ``ffn`` adds to the residual."""
        return _times(output_TH, self.multiplier)


@dataclass(eq=False)
class PartialPass:
    """A pass between two layers: the residual in two parts, ``delta + x``, and the layer that comes next."""

    batch: Batch
    rope: tuple[Tensor, Tensor]
    x_TH: Tensor
    delta_TH: Tensor | None = None
    next_layer: int = 0


@dataclass(frozen=True)
class Transformer:
    """A decoder. ``embed_VH`` and ``head_VH`` may be the same tensor (a tied head)."""

    embed_VH: Tensor
    rope: Rope
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head_VH: Tensor
    multipliers: Multipliers = NO_MULTIPLIERS
    products: Products = Products.FASTEST

    def __call__(self, batch: Batch, rows: list[int] | None = None) -> Tensor:
        """Float32 logits [T, V] of the batch's new tokens, or of ``rows`` of them only, as ``logits`` gives them."""
        partial = self.start(batch)
        self.advance(partial, len(self.layers))
        return self.finish(partial, rows)

    def start(self, batch: Batch) -> PartialPass:
        """A pass before its first layer."""
        x_TH, rope = self.embed(batch)
        return PartialPass(batch, rope, x_TH)

    def advance(self, partial: PartialPass, num_layers: int) -> None:
        """Takes a pass through its next ``num_layers`` layers, or as many as are left."""
        for layer in self.layers[partial.next_layer : partial.next_layer + num_layers]:
            partial.delta_TH, partial.x_TH = layer(partial.delta_TH, partial.x_TH, partial.rope, partial.batch)
            partial.next_layer += 1

    def finish(self, partial: PartialPass, rows: list[int] | None = None) -> Tensor:
        """The logits, as of a call, of a pass that has been through all layers."""
        delta_TH, x_TH = partial.delta_TH, partial.x_TH
        if rows is not None:
            delta_TH, x_TH = None if delta_TH is None else delta_TH[rows], x_TH[rows]
        return self.logits(delta_TH, x_TH)

    def embed(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The residual that the first layer takes, and the angles that all layers share."""
        x_TH = _times(self.embed_VH[batch.token_ids_T], self.multipliers.embedding)
        return x_TH, self.rope.table(batch.positions_T, like=x_TH)

    def logits(self, delta_TH: Tensor | None, x_TH: Tensor) -> Tensor:
        """Float32 logits [T, V] of the residual that the last layer gives.

        More than LOGIT_ROWS rows come in host memory; of them only a block at a time is on the device.
        """
        normed_TH, _ = self.norm.after_adding(delta_TH, x_TH)
        if len(normed_TH) <= LOGIT_ROWS:
            return self._logits(normed_TH)
        logits_TV = torch.empty(len(normed_TH), len(self.head_VH), dtype=torch.float32, device="cpu")
        for start in range(0, len(normed_TH), LOGIT_ROWS):
            block = slice(start, start + LOGIT_ROWS)
            logits_TV[block] = self._logits(normed_TH[block])
        return logits_TV

    def _logits(self, normed_TH: Tensor) -> Tensor:
        logits_TV = kernels.linear(normed_TH, self.head_VH, products=self.products)
        divisor = self.multipliers.logits_divisor
        return (logits_TV if divisor == 1.0 else logits_TV / divisor).float()


def _times(x_TH: Tensor, factor: float) -> Tensor:
    """``x_TH`` itself for a factor of 1."""
    return x_TH if factor == 1.0 else x_TH * factor
