"""The public ops. Every model computes through these names; this file alone decides what runs them."""

from duoserve.kernels.reference import (
    apply_rope,
    attention,
    linear,
    moe_combine,
    moe_down,
    moe_up,
    rms_norm,
    rope_table,
    route_plan,
    router_topk,
)
from duoserve.kernels.routing import RoutePlan, Work
from duoserve.kernels.weights import ExpertWeights

__all__ = [
    "ExpertWeights",
    "RoutePlan",
    "Work",
    "apply_rope",
    "attention",
    "linear",
    "moe_combine",
    "moe_down",
    "moe_up",
    "rms_norm",
    "rope_table",
    "route_plan",
    "router_topk",
]
