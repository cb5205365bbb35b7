"""An expert of one token, written as loops over its rows that a compiler fuses: it reads the slot once.

S slots, H hidden, I expert intermediate, N rows of a matrix, D its inner dimension, K top-k.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.traced import streamed_product
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix

# int4 is left out: the loops that Inductor makes of half bytes take five times as long as the products of PyTorch.
_FORMATS = (ExpertFormat.FLOAT, ExpertFormat.INT8)


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
    product_N = streamed_product(matrix.data_SNB[slot_1][0], x_D)
    return product_N if matrix.scales_SGN is None else product_N * matrix.scales_SGN[slot_1][0, 0]
