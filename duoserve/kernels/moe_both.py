"""Both products of a work list's experts. T tokens, H hidden, I expert intermediate, N routed rows."""

from __future__ import annotations

from torch import Tensor

from duoserve.kernels.moe_gemm import moe_down, moe_up
from duoserve.kernels.routing import RoutePlan, Work
from duoserve.kernels.weights import ClampedUp, ExpertWeights


def moe_experts(
    x_TH: Tensor,
    weights: ExpertWeights,
    plan: RoutePlan,
    work: Work,
    act_NI: Tensor,
    y_NH: Tensor,
    clamped: ClampedUp | None = None,
) -> None:
    """``moe_up``, then ``moe_down``, whose errors these are."""
    moe_up(x_TH, weights, plan, work, act_NI, clamped)
    moe_down(act_NI, weights, plan, work, y_NH)
