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
from duoserve.kernels.traced import streamed_product
from duoserve.kernels.weights import ExpertFormat, ExpertWeights

# Numbers of rows that calls are made for. Of one or two, products are loops; of more, those of a library, which takes
# sixteen rows in about the time of two where the machine multiplies their dtype.
LOOPS, WIDENED, NATIVE = (1, 2), (1, 2, 4), (1, 2, 4, 16)


def call_rows(weights: ExpertWeights) -> tuple[int, ...]:
    """The numbers of rows that ``token_expert`` computes faster than the ops of a model, ascending.

    Of int4 and fp8 none: the loops that Inductor makes of half bytes take five times as long as the products of
    PyTorch.
    """
    if weights.format is ExpertFormat.FLOAT:
        return NATIVE if has_native_matmul(weights.w13_SNH.dtype) else WIDENED
    return LOOPS if weights.format is ExpertFormat.INT8 else ()


class SlotWeights(NamedTuple):
    """The weights in one slot: matrices [2I, H] and [H, I], and in int8 the scales of their rows."""

    w13_NH: Tensor
    w2_HI: Tensor
    s13_N: Tensor | None
    s2_H: Tensor | None

    @classmethod
    def of(cls, weights: ExpertWeights, slot: int) -> SlotWeights:
        """Those of FLOAT or INT8 weights."""
        scales = (None if s_S1N is None else s_S1N[slot, 0] for s_S1N in (weights.s13, weights.s2))
        return cls(weights.w13_SNH[slot], weights.w2_SHI[slot], *scales)


def token_expert(x_BH: Tensor, weights: SlotWeights, tokens_R: Tensor, places_R: Tensor, y_NH: Tensor) -> None:
    """Writes ``w2 (silu(w1 x) * (w3 x))`` of R tokens to rows ``places_R`` of ``y_NH``.

    ``tokens_R`` (rows of ``x_BH``) and ``places_R`` are int64. Sums are made in float32, and rounded to ``x_BH``'s
    dtype behind each of the two matrices. No value is read on the host, so that a tracer can follow. Source: SwiGLU,
    Shazeer (2020).
    """
    product_RN = _product(weights.w13_NH, weights.s13_N, x_BH[tokens_R])
    gate_RI, up_RI = product_RN.view(len(product_RN), -1, 2).unbind(-1)
    act_RI = (F.silu(gate_RI) * up_RI).to(x_BH.dtype)
    y_NH.index_copy_(0, places_R, _product(weights.w2_HI, weights.s2_H, act_RI).to(y_NH.dtype))


def _product(w_ND: Tensor, scales_N: Tensor | None, x_RD: Tensor) -> Tensor:
    """``x w^T`` in float32 [R, N]."""
    if len(x_RD) > LOOPS[-1]:
        return linear(x_RD, w_ND).float()
    product_RN = torch.stack([streamed_product(w_ND, x_D) for x_D in x_RD.unbind()])
    return product_RN if scales_N is None else product_RN * scales_N
