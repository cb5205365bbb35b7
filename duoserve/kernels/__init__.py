"""The public ops. Every model computes through these names; this file alone decides what runs them.

Tensors on a GPU go to Triton, others to the twins in ``reference``. With ``DUOSERVE_KERNELS=triton`` all of them go to
Triton, which on a CPU means its interpreter (``TRITON_INTERPRET=1``): slow, but a check of the kernels in a model.

T tokens, K top-k, E experts, H hidden, I expert intermediate, N = T * K routed rows.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from duoserve.kernels import reference
from duoserve.kernels.reference import (
    apply_rope,
    attention,
    linear,
    moe_combine,
    rms_norm,
    rope_table,
    router_topk,
)
from duoserve.kernels.routing import RoutePlan, Work
from duoserve.kernels.weights import ExpertFormat, ExpertWeights

__all__ = [
    "ExpertFormat",
    "ExpertWeights",
    "RoutePlan",
    "Work",
    "apply_rope",
    "attention",
    "linear",
    "moe_combine",
    "moe_down",
    "moe_gemv_down",
    "moe_gemv_up",
    "moe_up",
    "rms_norm",
    "rope_table",
    "route_plan",
    "router_topk",
]

_TRITON_ON_CPU = os.environ.get("DUOSERVE_KERNELS") == "triton"


def _ops(operand: Tensor) -> ModuleType:
    """The module that computes with ``operand``."""
    if operand.is_cuda or _TRITON_ON_CPU:
        # The extra `triton`: a CPU does without it, and without the second that its import takes.
        from duoserve.kernels import triton_ops  # noqa: PLC0415

        return triton_ops
    return reference


def route_plan(topk_ids_TK: Tensor, slots_E: Tensor) -> RoutePlan:
    """The routed rows sorted stably by expert, and the experts by whether they have a slot: see RoutePlan.

    ``topk_ids_TK`` is int32 or int64; ``slots_E`` int32, -1 for an expert in no slot. An id outside 0..E-1 names no
    expert: its row sorts last and no op computes it.
    """
    plan: RoutePlan = _ops(topk_ids_TK).route_plan(topk_ids_TK, slots_E)
    return plan


def moe_up(x_TH: Tensor, weights: ExpertWeights, plan: RoutePlan, work: Work, act_NI: Tensor) -> None:
    """``silu(x w1^T) * (x w3^T)`` for the rows of each expert in ``work``, into their sorted rows of ``act_NI``.

    Other rows are not touched. SwiGLU: Shazeer (2020).
    """
    _ops(x_TH).moe_up(x_TH, weights, plan, work, act_NI)


def moe_down(act_NI: Tensor, weights: ExpertWeights, plan: RoutePlan, work: Work, y_NH: Tensor) -> None:
    """Writes ``act w2^T`` of each expert in ``work``, unweighted, to its rows' places ``token * K + j`` in ``y_NH``."""
    _ops(act_NI).moe_down(act_NI, weights, plan, work, y_NH)


def moe_gemv_up(x_1H: Tensor, weights: ExpertWeights, slots_K: Tensor, act_KI: Tensor) -> None:
    """``moe_up`` of one token's K experts, which are in ``slots_K`` (int32); FLOAT weights only."""
    _ops(x_1H).moe_gemv_up(x_1H, weights, slots_K, act_KI)


def moe_gemv_down(
    act_KI: Tensor,
    weights: ExpertWeights,
    slots_K: Tensor,
    topk_weights_1K: Tensor,
    shared_1H: Tensor | None,
    out_1H: Tensor,
) -> None:
    """One token's ``sum_j weight_j * act_j w2_j^T + shared``, rounded once: ``moe_down`` and ``moe_combine`` in one."""
    _ops(act_KI).moe_gemv_down(act_KI, weights, slots_K, topk_weights_1K, shared_1H, out_1H)
