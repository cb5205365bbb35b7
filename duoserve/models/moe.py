"""The MoE block: router -> acquire -> kernels.

T tokens, K top-k, E experts, H hidden, I expert intermediate, N = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.kernels import ExpertWeights, HostWork
from duoserve.models.tap import RoutingTap
from duoserve.scheduling.source import ExpertSource


class RoutingScript(Protocol):
    """Chooses in the routers' place, so that weights which route like nothing real can be run on recorded routing."""

    def chosen(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Weights (float32) and ids (int64) [T, K] for the rows of the pass that runs."""
        ...


@dataclass(frozen=True)
class MoEBlock:
    """Routes each token to its top-k experts and computes them as they become ready, residents first.

    Each expert's rows are one product of their own and the combine has a fixed order, so the output has the same bits
    whatever slots the experts are in and in whatever order they arrive. ``tap`` hears what was chosen. Where there
    is a ``script`` the router computes all the same, and the script's choice is taken.
    """

    layer: int
    router_EH: Tensor
    top_k: int
    source: ExpertSource
    weights: ExpertWeights
    tap: RoutingTap | None = None
    script: RoutingScript | None = None

    def __call__(self, x_TH: Tensor) -> Tensor:
        topk_weights_TK, topk_ids_TK = kernels.router_topk(kernels.linear(x_TH, self.router_EH), self.top_k)
        if self.script is not None:
            topk_weights_TK, topk_ids_TK = self.script.chosen(self.layer, len(x_TH))
        if self.tap is not None:
            self.tap.routed(self.layer, x_TH, topk_weights_TK, topk_ids_TK)
        plan = kernels.route_plan(topk_ids_TK, self._unknown_slots_E)
        act_NI = x_TH.new_empty(topk_ids_TK.numel(), self.weights.w2_SHI.shape[2])
        y_NH = x_TH.new_empty(topk_ids_TK.numel(), x_TH.shape[1])
        with self.source.acquire(self.layer, plan.by_demand()) as lease:
            for ready in lease:
                work = HostWork.of(ready, x_TH.device)
                kernels.moe_up(x_TH, self.weights, plan, work, act_NI)
                kernels.moe_down(act_NI, self.weights, plan, work, y_NH)
        return kernels.moe_combine(y_NH.view(*topk_ids_TK.shape, -1), topk_weights_TK)

    @cached_property
    def _unknown_slots_E(self) -> Tensor:
        """The lease says where the experts are, batch by batch; the plan is made before."""
        return torch.full((len(self.router_EH),), -1, dtype=torch.int32, device=self.router_EH.device)
