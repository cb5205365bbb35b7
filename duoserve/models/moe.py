"""The MoE block: router -> acquire -> kernels.

T tokens, K top-k, E experts, H hidden, I expert intermediate, N = T * K routed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.kernels import DeviceWork, ExpertWeights, HostRows, HostWork, RoutePlan, Work
from duoserve.models.tap import RoutingTap
from duoserve.scheduling.source import ExpertSource, Lease


class Routed(NamedTuple):
    """What the router chose for ``x_TH``, and where the experts' results go."""

    x_TH: Tensor
    topk_weights_TK: Tensor
    topk_ids_TK: Tensor
    plan: RoutePlan
    act_NI: Tensor
    y_NH: Tensor


@dataclass(frozen=True)
class MoEBlock:
    """Routes each token to its top-k experts and computes them as they become ready, residents first.

    Each expert's rows are one product of their own and the combine has a fixed order, so the output has the same bits
    whatever slots the experts are in and in whatever order they arrive. ``tap`` hears what was chosen.
    """

    layer: int
    router_EH: Tensor
    top_k: int
    source: ExpertSource
    weights: ExpertWeights
    tap: RoutingTap | None = None

    def __call__(self, x_TH: Tensor) -> Tensor:
        routed = self.route(x_TH)
        with self.acquire(routed, routed.plan.by_demand()) as lease:
            for ready in lease:
                self.compute(routed, HostWork.of(ready, x_TH.device))
        return self.combine(routed)

    def route(self, x_TH: Tensor, slots_E: Tensor | None = None) -> Routed:
        """The router's choice, and room for the experts' results; nothing waits for the device.

        ``slots_E`` (int32) says where the experts are, where that is known before the lease.
        """
        topk_weights_TK, topk_ids_TK = kernels.router_topk(kernels.linear(x_TH, self.router_EH), self.top_k)
        plan = kernels.route_plan(topk_ids_TK, self._unknown_slots_E if slots_E is None else slots_E)
        act_NI = x_TH.new_empty(topk_ids_TK.numel(), self.weights.w2_SHI.shape[2])
        y_NH = x_TH.new_empty(topk_ids_TK.numel(), x_TH.shape[1])
        return Routed(x_TH, topk_weights_TK, topk_ids_TK, plan, act_NI, y_NH)

    def acquire(self, routed: Routed, experts: Sequence[int]) -> Lease:
        """Lets the tap hear the choice, then leases its ``experts``: see ExpertSource."""
        self.announce(routed)
        return self.source.acquire(self.layer, experts)

    def announce(self, routed: Routed) -> None:
        """Lets the tap, if there is one, hear the choice."""
        if self.tap is not None:
            self.tap.routed(self.layer, routed.x_TH, routed.topk_weights_TK, routed.topk_ids_TK)

    def compute(self, routed: Routed, work: Work) -> None:
        """Some of the chosen experts, from the slots that they are in."""
        kernels.moe_up(routed.x_TH, self.weights, routed.plan, work, routed.act_NI)
        kernels.moe_down(routed.act_NI, self.weights, routed.plan, work, routed.y_NH)

    def compute_missing(self, routed: Routed, source: HostRows, slots_E: Tensor) -> None:
        """The chosen experts that were in no slot, read through from the host into the first of ``slots_E`` (int32)."""
        missing = routed.plan.missing
        work = DeviceWork(missing.experts_W, slots_E, missing.count_1)
        kernels.moe_up_fill(routed.x_TH, self.weights, source, routed.plan, work, routed.act_NI)
        kernels.moe_down_fill(routed.act_NI, self.weights, source, routed.plan, work, routed.y_NH)

    def combine(self, routed: Routed) -> Tensor:
        """The block's output, once all chosen experts have been computed."""
        y_TKH = routed.y_NH.view(*routed.topk_ids_TK.shape, -1)
        return kernels.moe_combine(y_TKH, routed.topk_weights_TK)

    @cached_property
    def _unknown_slots_E(self) -> Tensor:
        """The lease says where the experts are, batch by batch; the plan is made before."""
        return torch.full((len(self.router_EH),), -1, dtype=torch.int32, device=self.router_EH.device)
