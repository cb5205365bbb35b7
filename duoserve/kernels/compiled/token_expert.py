"""An expert of a few tokens, written so that a compiler makes loops of it that read the slot once.

S slots, H hidden, I expert intermediate, N rows of a matrix, D its inner dimension, B tokens, R routed rows, J of them
of the expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.bf12 import Bf12Rows
from duoserve.kernels.compiled.streamed import (
    streamed_bf12_product,
    streamed_fp8_product,
    streamed_int4_product,
    streamed_product,
)
from duoserve.kernels.matmul import has_native_matmul, linear
from duoserve.kernels.weights import FP8_BLOCK, ExpertFormat, ExpertWeights, Matrix

# Products of up to this many rows are loops. Larger ones are a library's, which takes about as long for sixteen rows as
# for four where the machine multiplies their dtype.
LOOP_ROWS = 4
# The codes of a group of this size fill a vector of words; for smaller groups PyTorch's products are faster.
INT4_GROUP = 128


class CallRows(NamedTuple):
    """The ``sizes`` in rows that calls of ``token_expert`` are made for, ascending; up to ``most`` rows they pay."""

    sizes: tuple[int, ...]
    most: int

    def next_call(self, num_rows: int) -> int:
        """The size of the call that computes an expert's ``num_rows`` rows, or the first of them."""
        return next((size for size in self.sizes if size >= num_rows), self.sizes[-1])


NO_CALLS = CallRows((), 0)


def call_rows(weights: ExpertWeights) -> CallRows:
    """The numbers of rows for which ``token_expert`` beats the model's ops, which decode quantized weights first.

    Loops over int4 and fp8 take long to compile, so there are none of four rows. There are no loops at all for int4 in
    smaller groups, for fp8 in blocks that are cut short, and for MXFP4.
    """
    match weights.format:
        case ExpertFormat.FLOAT:
            return CallRows((1, 2, 4, 16), 16) if has_native_matmul(weights.w13_SNH.dtype) else CallRows((1, 2, 4), 4)
        case ExpertFormat.INT8:
            return CallRows((1, 2, 4), 8)
        case ExpertFormat.BF12:
            return CallRows((1, 2, 4), 16)
        case ExpertFormat.INT4 if weights.group == INT4_GROUP:
            return CallRows((1, 2), 16)
        case ExpertFormat.FP8 if not (weights.w13.inner % FP8_BLOCK or weights.w2.inner % FP8_BLOCK):
            return CallRows((1, 2), 4)
    return NO_CALLS


class SlotMatrix(NamedTuple):
    """A matrix in one slot: ``data`` [N, D] in floats, fp8 or int8, or int4 codes in int32 words, and what decodes it.

    int8 has ``scales`` [N]; fp8 has ``scales`` [blocks of N, G], the rows of ``lanes`` blocks taking turns; int4 has
    ``scales`` and ``zeros`` [G, N] and maybe the ``order`` of features. BF12 has all in ``rows``, ``data`` included.
    """

    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    order: Tensor | None = None
    lanes: int = 1
    rows: Bf12Rows | None = None

    @classmethod
    def of(cls, matrix: Matrix, slot: int) -> SlotMatrix:
        """The matrix in ``slot``; any format but MXFP4."""
        data, scales = matrix.data_SNB[slot], matrix.scales_SGN
        if scales is None:
            return cls(data)
        if matrix.format is ExpertFormat.INT8:
            return cls(data, scales[slot, 0])
        if matrix.format is ExpertFormat.BF12:
            rows = Bf12Rows.of(data, scales[slot, 0], matrix.inner)
            return cls(rows.signed_ND, rows=rows)
        if matrix.format is ExpertFormat.FP8:
            return cls(data.view(torch.float8_e4m3fn), scales[slot], lanes=2 if matrix.interleaved else 1)
        assert matrix.zeros_SGN is not None
        order = None if matrix.order_SD is None else matrix.order_SD[slot]
        return cls(data.view(torch.int32), scales[slot], matrix.zeros_SGN[slot], order)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the matrix, in the same order for every slot."""
        parts = self.rows or (self.data, self.scales, self.zeros, self.order)
        return [part for part in parts if part is not None]

    def product(self, x_JD: Tensor) -> Tensor:
        """``x w^T`` in float32 [J, N]."""
        if len(x_JD) > LOOP_ROWS:
            return linear(x_JD, self.data).float()
        if self.order is not None:
            x_JD = x_JD[:, self.order]
        return torch.stack([self._of_one(x_D) for x_D in x_JD.unbind()])

    def _of_one(self, x_D: Tensor) -> Tensor:
        if self.rows is not None:
            return streamed_bf12_product(self.rows, x_D)
        if self.scales is None:
            return streamed_product(self.data, x_D)
        if self.data.dtype is torch.int8:
            return streamed_product(self.data, x_D) * self.scales
        if self.zeros is None:
            return streamed_fp8_product(self.data, self._row_scales(self.scales), x_D)
        return streamed_int4_product(self.data, self.scales, self.zeros, x_D)

    def _row_scales(self, scales: Tensor) -> Tensor:
        """The scales of each weight row [N, G], from those of blocks of fp8."""
        blocks_B1LG = scales.view(-1, 1, self.lanes, scales.shape[1])
        return blocks_B1LG.expand(-1, FP8_BLOCK, -1, -1).reshape(-1, scales.shape[1])


class SlotWeights(NamedTuple):
    """The matrices in one slot: ``w13`` [2I, H], gate and up rows in turn, and ``w2`` [H, I]."""

    w13: SlotMatrix
    w2: SlotMatrix

    @classmethod
    def of(cls, weights: ExpertWeights, slot: int) -> SlotWeights:
        """The matrices in ``slot``; any format but MXFP4."""
        return cls(SlotMatrix.of(weights.w13, slot), SlotMatrix.of(weights.w2, slot))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of both matrices."""
        return [*self.w13.tensors, *self.w2.tensors]


def token_expert(x_BH: Tensor, weights: SlotWeights, tokens_J: Tensor, places_J: Tensor, y_RH: Tensor) -> None:
    """Writes ``w2 (silu(w1 x) * (w3 x))`` of J tokens to rows ``places_J`` of ``y_RH``.

    ``tokens_J`` (rows of ``x_BH``) and ``places_J`` are int64. Sums are made in float32 and rounded to ``x_BH``'s dtype
    after each of the two products. No value is read on the host, so that a tracer can follow. Source: SwiGLU, Shazeer
    (2020).
    """
    product_JN = weights.w13.product(x_BH[tokens_J])
    gate_JI, up_JI = product_JN.view(len(product_JN), -1, 2).unbind(-1)
    act_JI = (F.silu(gate_JI) * up_JI).to(x_BH.dtype)
    y_RH.index_copy_(0, places_J, weights.w2.product(act_JI).to(y_RH.dtype))
