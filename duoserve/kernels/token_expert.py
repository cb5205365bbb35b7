"""An expert of one token, written as loops over its rows that a compiler fuses: the weights are read once, from the slot.

S slots, H hidden, I expert intermediate, N rows of a matrix, D its inner dimension, B bytes of a row, G groups of D, C
half a group, K top-k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.traced import side_by_side, streamed_product
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix

_FORMATS = (ExpertFormat.FLOAT, ExpertFormat.INT8, ExpertFormat.INT4)


def knows(weights: ExpertWeights) -> bool:
    """Whether ``token_expert`` knows the format."""
    return weights.format in _FORMATS


def token_expert(x_1H: Tensor, weights: ExpertWeights, slot_1: Tensor, place_1: Tensor, y_KH: Tensor) -> None:
    """Writes ``w2 (silu(w1 x) * (w3 x))`` of the expert in ``slot_1`` to row ``place_1`` of ``y_KH`` (both int64).

    Sums are made in float32, and rounded to ``x_1H``'s dtype behind each of the two matrices. No value is read on the
    host, so that a tracer can follow. Source: SwiGLU, Shazeer (2020).
    """
    gate_I, up_I = _product(weights.w13, slot_1, x_1H[0]).view(-1, 2).unbind(-1)
    act_I = (F.silu(gate_I) * up_I).to(x_1H.dtype)
    y_KH.index_copy_(0, place_1, _product(weights.w2, slot_1, act_I).to(y_KH.dtype)[None])


def _product(matrix: Matrix, slot_1: Tensor, x_D: Tensor) -> Tensor:
    """``w x`` in float32 [N]."""
    data_NB = matrix.data_SNB[slot_1][0]
    if matrix.scales_SGN is None:
        return streamed_product(data_NB, x_D)
    scales_GN = matrix.scales_SGN[slot_1][0]
    if matrix.format is ExpertFormat.INT8:
        return streamed_product(data_NB, x_D) * scales_GN[0]
    assert matrix.zeros_SGN is not None
    if matrix.order_SD is not None:
        x_D = x_D[matrix.order_SD[slot_1][0].long()]
    return _int4_product(data_NB, scales_GN.float(), matrix.zeros_SGN[slot_1][0].float(), x_D.float())


def _int4_product(data_NB: Tensor, scales_GN: Tensor, zeros_GN: Tensor, x_D: Tensor) -> Tensor:
    """Codes are multiplied as they are; what their zero-points take off, and the scales, is applied to a group's sum."""
    x_GC2 = x_D.view(len(scales_GN), -1, 2)
    even_GC, odd_GC = x_GC2[..., 0].contiguous(), x_GC2[..., 1].contiguous()
    offset_GN = zeros_GN * x_GC2.sum((1, 2))[:, None]
    sums = []
    for part_RB in side_by_side(data_NB):
        part_RGC = part_RB.view(len(part_RB), *even_GC.shape)
        low, high = (part_RGC & 15).float(), (part_RGC >> 4).float()
        sums.append((low * even_GC + high * odd_GC).sum(-1))
    return ((torch.cat(sums).T - offset_GN) * scales_GN).sum(0)
