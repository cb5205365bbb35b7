"""The PyTorch spec of the ops that bring experts from host memory into slots. Imports without triton.

T tokens, K top-k, E experts, S slots, H hidden, I expert intermediate, R = T * K routed rows, B bytes of a row.
"""

from __future__ import annotations

import math

from torch import Tensor

from duoserve.kernels import reference
from duoserve.kernels.host_rows import HostRows, offset_in_row
from duoserve.kernels.routed_rows import HostWork, RoutePlan, Work
from duoserve.kernels.weights import ClampedUp, ExpertWeights, Matrix

ALL_BITS = 0xFF  # NaN in every float format, and in the scales of the others


def page_gather(source: HostRows, work: Work, pool_SB: Tensor) -> None:
    """Copies the row of each expert in ``work`` into its slot, a row of ``pool_SB`` (uint8 [S, B]).

    If ``source`` has no row of an expert, its slot is filled with NaN. An expert whose slot does not exist is left out.
    """
    for expert, slot in work.pairs():
        row_B = source.rows_E[expert]
        if not 0 <= slot < len(pool_SB):
            continue
        if row_B is None:
            pool_SB[slot] = ALL_BITS
        else:
            pool_SB[slot].copy_(row_B)


def moe_up_fill(
    x_TH: Tensor,
    weights: ExpertWeights,
    source: HostRows,
    plan: RoutePlan,
    work: Work,
    act_RI: Tensor,
    clamped: ClampedUp | None = None,
) -> None:
    """Copies w13 and its scales of each expert in ``work`` from ``source`` into its slot, then ``moe_up``.

    An expert without a row or a slot gives NaN.
    """
    filled, lost = _filled(weights, weights.w13, source, work)
    reference.moe_up(x_TH, weights, plan, filled, act_RI, clamped)
    for expert, _ in lost:
        start, stop = plan.rows(expert)
        act_RI[start:stop] = math.nan


def moe_down_fill(
    act_RI: Tensor, weights: ExpertWeights, source: HostRows, plan: RoutePlan, work: Work, y_RH: Tensor
) -> None:
    """Copies w2 and its scales of each expert in ``work`` from ``source`` into its slot, then ``moe_down``.

    An expert without a row or a slot gives NaN.
    """
    filled, lost = _filled(weights, weights.w2, source, work)
    reference.moe_down(act_RI, weights, plan, filled, y_RH)
    for expert, _ in lost:
        start, stop = plan.rows(expert)
        y_RH[plan.order_R[start:stop].long()] = math.nan


def _filled(weights: ExpertWeights, matrix: Matrix, source: HostRows, work: Work) -> tuple[Work, list[tuple[int, int]]]:
    """Copies ``matrix`` of the experts in ``work``; gives the experts copied, and those without a row or a slot."""
    filled, lost = [], []
    for expert, slot in work.pairs():
        row_B = source.rows_E[expert]
        if row_B is None or not 0 <= slot < len(matrix.data_SNB):
            lost.append((expert, slot))
            continue
        for part in matrix.parts:
            start, size = offset_in_row(part, weights), part.shape[1:].numel() * part.element_size()
            part[slot].copy_(row_B[start : start + size].view(part.dtype).view(part.shape[1:]))
        filled.append((expert, slot))
    return HostWork.of(filled, work.experts_W.device), lost
