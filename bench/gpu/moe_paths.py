"""One routed layer through duoserve's kernels, through their twins and in float64, and how far these may differ.

T tokens, K top-k, E experts, H hidden, I expert intermediate, R = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels import reference
from duoserve.kernels.combine import moe_combine
from duoserve.kernels.moe_gemm import moe_down, moe_up
from duoserve.kernels.moe_gemv import moe_gemv_down, moe_gemv_up
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.route_sort import route_plan
from duoserve.kernels.routed_rows import RoutePlan
from duoserve.kernels.weights import ExpertWeights
from gpu.moe_operands import Buffers, Pool, Step

ROUNDING_ERROR = 4e-3  # relative norm that one rounding to bf16 may cost, as in tests/kernels
SAMPLED_TOKENS = 32


@dataclass(frozen=True)
class Check:
    """``error``: relative norm of the difference; NaN never passes."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the kernel computes what it should."""
        return self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self) | {"passed": self.passed}


def layer(step: Step, weights: ExpertWeights) -> Tensor:
    """A whole routed layer through the GEMMs: [T, H]."""
    plan = route_plan(step.ids_TK, step.slots_E)
    act_RI = step.x_TH.new_empty(step.ids_TK.numel(), weights.w2.inner)
    y_RH = step.x_TH.new_empty(step.ids_TK.numel(), step.x_TH.shape[1])
    moe_up(step.x_TH, weights, plan, plan.resident, act_RI)
    moe_down(act_RI, weights, plan, plan.resident, y_RH)
    return moe_combine(y_RH.view(*step.ids_TK.shape, -1), step.topk_weights_TK)


def one_token_layer(step: Step, weights: ExpertWeights) -> Tensor:
    """The same for one token through the matrix-vector kernels: [1, H]."""
    slots_K = step.slots_E[step.ids_TK[0]]
    act_KI = step.x_TH.new_empty(len(slots_K), weights.w2.inner)
    out_1H = torch.empty_like(step.x_TH)
    moe_gemv_up(step.x_TH, weights, slots_K, act_KI)
    moe_gemv_down(act_KI, weights, slots_K, step.topk_weights_TK, None, out_1H)
    return out_1H


def truth(step: Step, weights: ExpertWeights, tokens: Tensor) -> Tensor:
    """The layer's output [len(tokens), H] of some of its tokens, in float64 on the weights as they decode."""
    x_TH, ids_TK, topk_weights_TK = step.x_TH[tokens].double(), step.ids_TK[tokens], step.topk_weights_TK[tokens]
    out_TH = torch.zeros_like(x_TH)
    for expert in ids_TK.unique().tolist():
        slot = int(step.slots_E[expert])
        rows, places = (ids_TK == expert).nonzero(as_tuple=True)
        up = x_TH[rows] @ dense(weights.w13, slot).double().T
        down = (F.silu(up[:, 0::2]) * up[:, 1::2]) @ dense(weights.w2, slot).double().T
        out_TH.index_add_(0, rows, down * topk_weights_TK[rows, places].double()[:, None])
    return out_TH


def sample(tokens: int, device: torch.device) -> Tensor:
    """Which tokens of a step are computed in float64: all of a few, else some from the first to the last."""
    return torch.linspace(0, tokens - 1, min(tokens, SAMPLED_TOKENS), device=device).round().long()


def against_truth(name: str, out_TH: Tensor, step: Step, weights: ExpertWeights, roundings: int) -> Check:
    """A layer's output against float64; ``roundings`` to bf16 lie on its way."""
    tokens = sample(len(step.x_TH), step.x_TH.device)
    return Check(name, relative_error(out_TH[tokens], truth(step, weights, tokens)), roundings * ROUNDING_ERROR)


def check_layer(step: Step, pool: Pool) -> list[Check]:
    """Every kernel of the layer against its twin on the same operands, and the whole layer against float64."""
    plan, twin_plan = route_plan(step.ids_TK, step.slots_E), reference.route_plan(step.ids_TK, step.slots_E)
    ours, twins = Buffers.of(step, pool.shape), Buffers.of(step, pool.shape)
    moe_up(step.x_TH, pool.weights, plan, plan.resident, ours.act_RI)
    moe_down(ours.act_RI, pool.weights, plan, plan.resident, ours.y_RH)
    reference.moe_up(step.x_TH, pool.weights, twin_plan, twin_plan.resident, twins.act_RI)
    reference.moe_down(ours.act_RI, pool.weights, twin_plan, twin_plan.resident, twins.y_RH)
    y_TKH = ours.y_RH.view(*step.ids_TK.shape, -1)
    out_TH, twin_TH = (op(y_TKH, step.topk_weights_TK) for op in (moe_combine, reference.moe_combine))
    return [
        Check("route_plan", float(not same_plan(plan, twin_plan)), 0.0),
        # The twin rounds the product, its silu and their product.
        Check("moe_up", relative_error(ours.act_RI, twins.act_RI), 3 * ROUNDING_ERROR),
        Check("moe_down", relative_error(ours.y_RH, twins.y_RH), 2 * ROUNDING_ERROR),
        Check("moe_combine", relative_error(out_TH, twin_TH), ROUNDING_ERROR),
        against_truth("layer", layer(step, pool.weights), step, pool.weights, roundings=3),
    ]


def same_plan(ours: RoutePlan, theirs: RoutePlan) -> bool:
    """Whether two plans are equal in every number."""
    mine, other = ((p.order_R, p.starts_E1, *_lists(p)) for p in (ours, theirs))
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def _lists(plan: RoutePlan) -> list[Tensor]:
    return [t for work in (plan.resident, plan.missing) for t in (work.experts_W, work.slots_W, work.count_1)]


def relative_error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth||, in float64."""
    truth = truth.double()
    return float((out.double() - truth).norm() / truth.norm().clamp_min(1e-30))
