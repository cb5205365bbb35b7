"""The decoder that every family builds: embedding, layers of attention and experts, norm, head.

T new tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.models.batch import Batch
from duoserve.models.layers import RMSNorm, Rope

Attention = Callable[[Tensor, tuple[Tensor, Tensor], Batch], Tensor]
FeedForward = Callable[[Tensor], Tensor]

# Rows of logits that are made at a time: all of a long prompt's would take more memory than its activations.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm residual layer: attention, then the experts (or a dense feed-forward)."""

    attention_norm: RMSNorm
    attention: Attention
    ffn_norm: RMSNorm
    ffn: FeedForward

    def __call__(
        self, delta_TH: Tensor | None, x_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Takes and gives the residual in two parts, ``delta + x``: the next norm adds them, in one op with itself."""
        normed_TH, x_TH = self.attention_norm.after_adding(delta_TH, x_TH)
        normed_TH, x_TH = self.ffn_norm.after_adding(self.attention(normed_TH, rope, batch), x_TH)
        return self.ffn(normed_TH), x_TH


@dataclass(frozen=True)
class Transformer:
    """``embed_VH`` and ``head_VH`` may be the same tensor (a tied head)."""

    embed_VH: Tensor
    rope: Rope
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head_VH: Tensor

    def __call__(self, batch: Batch, rows: list[int] | None = None) -> Tensor:
        """Float32 logits [T, V] of the batch's new tokens, or of ``rows`` of them only.

        More than LOGIT_ROWS rows come in host memory; of them only a block at a time is on the device.
        """
        x_TH = self.embed_VH[batch.token_ids_T]
        rope = self.rope.table(batch.positions_T, like=x_TH)
        delta_TH = None
        for layer in self.layers:
            delta_TH, x_TH = layer(delta_TH, x_TH, rope, batch)
        if rows is not None:
            delta_TH, x_TH = None if delta_TH is None else delta_TH[rows], x_TH[rows]
        normed_TH, _ = self.norm.after_adding(delta_TH, x_TH)
        if len(normed_TH) <= LOGIT_ROWS:
            return self._logits(normed_TH)
        logits_TV = torch.empty(len(normed_TH), len(self.head_VH))
        for start in range(0, len(normed_TH), LOGIT_ROWS):
            block = slice(start, start + LOGIT_ROWS)
            logits_TV[block] = self._logits(normed_TH[block])
        return logits_TV

    def _logits(self, normed_TH: Tensor) -> Tensor:
        return kernels.linear(normed_TH, self.head_VH).float()
