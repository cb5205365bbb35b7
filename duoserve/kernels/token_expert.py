"""An expert of a few tokens, written so that a compiler makes loops of it that read the slot once.

S slots, H hidden, I expert intermediate, N rows of a matrix (in ``y_NH`` routed rows), D its inner dimension, R tokens
of B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.matmul import has_native_matmul, linear
from duoserve.kernels.streamed import streamed_int4_product, streamed_product
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix

# Numbers of rows that calls are made for. Of one or two, products are loops; of more, those of a library, which takes
# sixteen rows in about the time of two where the machine multiplies their dtype.
LOOPS, WIDENED, NATIVE = (1, 2), (1, 2, 4), (1, 2, 4, 16)
# Words of codes in such a group fill a vector; with less the loops are slower than the products of PyTorch.
INT4_GROUP = 128


def call_rows(weights: ExpertWeights) -> tuple[int, ...]:
    """The numbers of rows that ``token_expert`` computes faster than the ops of a model, ascending.

    Of int4 in smaller groups, of fp8 and of MXFP4 none.
    """
    if weights.format is ExpertFormat.FLOAT:
        return NATIVE if has_native_matmul(weights.w13_SNH.dtype) else WIDENED
    loops = weights.format is ExpertFormat.INT8 or (weights.format is ExpertFormat.INT4 and weights.group == INT4_GROUP)
    return LOOPS if loops else ()


class SlotMatrix(NamedTuple):
    """A matrix in one slot: [N, D] of floats or int8, or int4 codes in int32 words, with what decodes it.

    int8 has ``scales`` [N]; int4 ``scales`` and ``zeros`` [G, N] and maybe the ``order`` of features.
    """

    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, matrix: Matrix, slot: int) -> SlotMatrix:
        """That of FLOAT, INT8 or INT4 weights."""
        data, scales = matrix.data_SNB[slot], matrix.scales_SGN
        if scales is None:
            return cls(data)
        if matrix.zeros_SGN is None:
            return cls(data, scales[slot, 0])
        order = None if matrix.order_SD is None else matrix.order_SD[slot]
        return cls(data.view(torch.int32), scales[slot], matrix.zeros_SGN[slot], order)

    def product(self, x_RD: Tensor) -> Tensor:
        """``x w^T`` in float32 [R, N]."""
        if len(x_RD) > LOOPS[-1]:
            return linear(x_RD, self.data).float()
        if self.order is not None:
            x_RD = x_RD[:, self.order]
        return torch.stack([self._of_one(x_D) for x_D in x_RD.unbind()])

    def _of_one(self, x_D: Tensor) -> Tensor:
        if self.scales is None:
            return streamed_product(self.data, x_D)
        if self.zeros is None:
            return streamed_product(self.data, x_D) * self.scales
        return streamed_int4_product(self.data, self.scales, self.zeros, x_D)


class SlotWeights(NamedTuple):
    """The matrices in one slot: [2I, H], gate and up rows in turn, and [H, I]."""

    w13: SlotMatrix
    w2: SlotMatrix

    @classmethod
    def of(cls, weights: ExpertWeights, slot: int) -> SlotWeights:
        """Those of FLOAT, INT8 or INT4 weights."""
        return cls(SlotMatrix.of(weights.w13, slot), SlotMatrix.of(weights.w2, slot))

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that every slot has."""
        return [part for part in (*self.w13, *self.w2) if part is not None]


def token_expert(x_BH: Tensor, weights: SlotWeights, tokens_R: Tensor, places_R: Tensor, y_NH: Tensor) -> None:
    """Writes ``w2 (silu(w1 x) * (w3 x))`` of R tokens to rows ``places_R`` of ``y_NH``.

    ``tokens_R`` (rows of ``x_BH``) and ``places_R`` are int64. Sums are made in float32, and rounded to ``x_BH``'s
    dtype behind each of the two matrices. No value is read on the host, so that a tracer can follow. Source: SwiGLU,
    Shazeer (2020).
    """
    product_RN = weights.w13.product(x_BH[tokens_R])
    gate_RI, up_RI = product_RN.view(len(product_RN), -1, 2).unbind(-1)
    act_RI = (F.silu(gate_RI) * up_RI).to(x_BH.dtype)
    y_NH.index_copy_(0, places_R, weights.w2.product(act_RI).to(y_NH.dtype))
