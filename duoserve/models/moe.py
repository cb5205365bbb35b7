"""The MoE block: router -> acquire -> kernels.

T tokens, K top-k, E experts, H hidden, I expert intermediate, N = T * K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.architecture import ClampConfig, SharedExpertConfig
from duoserve.kernels import ExpertWeights, HostWork, RoutePlan, Work
from duoserve.models.layers import FeedForward, Linear
from duoserve.models.router import Router
from duoserve.models.tap import RoutingTap
from duoserve.models.tensors import Tensors
from duoserve.scheduling.source import ExpertSource


@dataclass(frozen=True)
class GatedFeedForward:
    """A shared expert whose output is weighted, token by token, by the sigmoid of ``gate``."""

    gate: Linear
    expert: FeedForward

    def __call__(self, x_TH: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x_TH)) * self.expert(x_TH)


@dataclass(frozen=True)
class ClampedExperts:
    """What gpt-oss's experts have beside their matrices: ``up_bias_E2I`` (gate and up in turn), ``down_bias_EH``."""

    config: ClampConfig
    up_bias_E2I: Tensor
    down_bias_EH: Tensor


@dataclass(frozen=True)
class MoEBlock:
    """Routes each token to its top-k experts and computes them as they become ready, residents first.

    Each expert's rows are one product of their own and the combine has a fixed order, so the output has the same bits
    whatever slots the experts are in and in whatever order they arrive. The shared expert is computed while those that
    are missing are on their way. ``tap`` hears what was chosen.
    """

    layer: int
    router: Router
    source: ExpertSource
    weights: ExpertWeights
    shared: Callable[[Tensor], Tensor] | None = None
    clamped: ClampedExperts | None = None
    tap: RoutingTap | None = None

    def __call__(self, x_TH: Tensor) -> Tensor:
        topk_weights_TK, topk_ids_TK = self.router.choose(self.router.logits(x_TH), x_TH.dtype)
        if self.tap is not None:
            self.tap.routed(self.layer, x_TH, topk_weights_TK, topk_ids_TK)
        plan = kernels.route_plan(topk_ids_TK, self._unknown_slots_E)
        act_NI = x_TH.new_empty(topk_ids_TK.numel(), self.weights.w2_SHI.shape[2])
        y_NH = x_TH.new_empty(topk_ids_TK.numel(), x_TH.shape[1])
        with self.source.acquire(self.layer, plan.by_demand()) as lease:
            shared_TH = None if self.shared is None else self.shared(x_TH)
            for ready in lease:
                work = HostWork.of(ready, x_TH.device)
                self._up(x_TH, plan, work, act_NI)
                kernels.moe_down(act_NI, self.weights, plan, work, y_NH)
        if self.clamped is not None:
            y_NH += self.clamped.down_bias_EH[topk_ids_TK.flatten()]
        return kernels.moe_combine(y_NH.view(*topk_ids_TK.shape, -1), topk_weights_TK, shared_TH)

    def _up(self, x_TH: Tensor, plan: RoutePlan, work: Work, act_NI: Tensor) -> None:
        if self.clamped is None:
            kernels.moe_up(x_TH, self.weights, plan, work, act_NI)
            return
        config = self.clamped.config
        bias_E2I = self.clamped.up_bias_E2I
        kernels.moe_up_clamped(x_TH, self.weights, plan, work, bias_E2I, config.alpha, config.limit, act_NI)

    @cached_property
    def _unknown_slots_E(self) -> Tensor:
        """The lease says where the experts are, batch by batch; the plan is made before."""
        weight_EH = self.router.gate.weight_NK
        return torch.full((len(weight_EH),), -1, dtype=torch.int32, device=weight_EH.device)


def load_shared(config: SharedExpertConfig, hidden: int, tensors: Tensors, name: str) -> FeedForward | GatedFeedForward:
    """The shared expert ``name``, and its gate ``<name>_gate`` where it has one."""
    expert = FeedForward.load(tensors.under(name), hidden, config.intermediate_size)
    return GatedFeedForward(Linear.load(tensors.under(f"{name}_gate"), 1, hidden), expert) if config.gated else expert


def load_clamped(
    config: ClampConfig, num_experts: int, hidden: int, intermediate: int, tensors: Tensors
) -> ClampedExperts:
    """The biases of gpt-oss's experts, which are few bytes and lie with the dense weights."""
    up_bias_E2I = tensors("gate_up_proj_bias", num_experts, 2 * intermediate)
    return ClampedExperts(config, up_bias_E2I, tensors("down_proj_bias", num_experts, hidden))
