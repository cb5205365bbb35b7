"""The MoE block: router -> acquire -> kernels.

T tokens, K top-k, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from duoserve import kernels
from duoserve.kernels import ExpertWeights, RoutePlan
from duoserve.scheduling.source import ExpertSource, ReadyExpert


@dataclass(frozen=True)
class MoEBlock:
    """Routes each token to its top-k experts and computes them as they become ready, residents first.

    Each expert's rows are one product of their own and the combine has a fixed order, so the output has the same bits
    whatever slots the experts are in and in whatever order they arrive.
    """

    layer: int
    router_EH: Tensor
    top_k: int
    source: ExpertSource
    weights: ExpertWeights

    def __call__(self, x_TH: Tensor) -> Tensor:
        topk_weights_TK, topk_ids_TK = kernels.router_topk(kernels.linear(x_TH, self.router_EH), self.top_k)
        plan = kernels.route_plan(topk_ids_TK)
        y_NH = x_TH.new_empty(topk_ids_TK.numel(), x_TH.shape[1])
        with self.source.acquire(self.layer, plan.by_demand()) as lease:
            for ready in lease:
                for one in ready:
                    self._compute(one, x_TH, plan, y_NH)
        return kernels.moe_combine(y_NH.view(*topk_ids_TK.shape, -1), topk_weights_TK)

    def _compute(self, one: ReadyExpert, x_TH: Tensor, plan: RoutePlan, y_NH: Tensor) -> None:
        start, stop = plan.rows(one.expert)
        rows_R = plan.order_N[start:stop]
        act_RI = kernels.moe_up(x_TH, self.weights, one.slot, rows_R, plan.top_k)
        kernels.moe_down(act_RI, self.weights, one.slot, rows_R, y_NH)
