"""The MoE block of a layer: its router chooses experts, they are acquired in slots, and kernels compute them.

T tokens, K top-k, E experts, H hidden, I expert intermediate, R = T * K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.architecture import ClampConfig, SharedExpertConfig
from duoserve.kernels import ClampedUp, DeviceWork, ExpertWeights, HostRows, HostWork, RoutePlan, Work
from duoserve.kernels.small_ops import ON_EVERY_DEVICE, SmallOps
from duoserve.models.layers import FeedForward, Linear
from duoserve.models.router import Router
from duoserve.models.tap import RoutingTap
from duoserve.models.tensors import Tensors
from duoserve.scheduling.source import ExpertSource, Lease


class Routed(NamedTuple):
    """What the router chose for the tokens ``x_TH``, and the memory that the experts' results go to.

    ``act_RI`` takes activations and ``y_RH`` outputs, one row for each token and expert that it chose.
    """

    x_TH: Tensor
    topk_weights_TK: Tensor
    topk_ids_TK: Tensor
    plan: RoutePlan
    act_RI: Tensor
    y_RH: Tensor


@dataclass(frozen=True)
class GatedFeedForward:
    """A shared expert whose output is weighted, token by token, by the sigmoid of ``gate``."""

    gate: Linear
    expert: FeedForward

    def __call__(self, x_TH: Tensor) -> Tensor:
        return kernels.by_rows(torch.sigmoid, self.gate(x_TH), self.gate.products) * self.expert(x_TH)


@dataclass(frozen=True)
class ClampedExperts:
    """What gpt-oss's experts have besides matrices: ``up``, a clamped activation with its bias, and another bias."""

    up: ClampedUp
    down_bias_EH: Tensor


class RoutingScript(Protocol):
    """Chooses experts in the routers' place, so that made-up weights can be run on routing that was recorded."""

    def chosen(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Weights (float32) and ids (int64) [T, K] for the rows of the pass that runs."""
        ...


@dataclass(frozen=True)
class MoEBlock:
    """Routes each token to its top-k experts and computes them as they become ready, residents first.

    Each expert's rows are one product of their own, and the combine has a fixed order. So the output has the same bits
    whatever slots the experts are in, and in whatever order they arrive. While missing experts are on their way,
    ``tap`` hears what was chosen and the shared expert is computed. With a ``script`` the router computes all the same,
    but the script's choice is taken.
    """

    layer: int
    router: Router
    source: ExpertSource
    weights: ExpertWeights
    shared: Callable[[Tensor], Tensor] | None = None
    clamped: ClampedExperts | None = None
    tap: RoutingTap | None = None
    script: RoutingScript | None = None
    ops: SmallOps = ON_EVERY_DEVICE

    def __call__(self, x_TH: Tensor) -> Tensor:
        routed = self.route(x_TH)
        with self.acquire(routed.plan.num_rows()) as lease:
            if self.tap is not None:
                self.tap.routed(self.layer, routed.x_TH, routed.topk_weights_TK, routed.topk_ids_TK)
                lease.prefetch()
            shared_TH = self.share(routed)
            for ready in lease:
                self.compute(routed, HostWork.of(ready, x_TH.device))
        return self.combine(routed, shared_TH)

    def route(self, x_TH: Tensor, slots_E: Tensor | None = None) -> Routed:
        """Lets the router choose, and allocates the experts' results; the host does not wait for the device.

        ``slots_E`` (int32) has the slot of each expert if that is known already, and not only from the lease.
        """
        topk_weights_TK, topk_ids_TK = self.router.choose(self.router.logits(x_TH), x_TH.dtype)
        if self.script is not None:
            topk_weights_TK, topk_ids_TK = self.script.chosen(self.layer, len(x_TH))
        plan = kernels.route_plan(topk_ids_TK, self._unknown_slots_E if slots_E is None else slots_E)
        act_RI = x_TH.new_empty(topk_ids_TK.numel(), self.weights.w2.inner)
        y_RH = x_TH.new_empty(topk_ids_TK.numel(), x_TH.shape[1])
        return Routed(x_TH, topk_weights_TK, topk_ids_TK, plan, act_RI, y_RH)

    def acquire(self, rows: Mapping[int, int]) -> Lease:
        """Leases the chosen experts; ``rows`` has for each how many tokens chose it. See ExpertSource."""
        experts = kernels.by_demand(rows)
        return self.source.acquire(self.layer, experts, [rows[expert] for expert in experts])

    def compute(self, routed: Routed, work: Work) -> None:
        """Computes those of the chosen experts that ``work`` names, from the slots that it says they are in."""
        kernels.moe_experts(routed.x_TH, self.weights, routed.plan, work, routed.act_RI, routed.y_RH, self._clamped_up)

    def compute_missing(self, routed: Routed, source: HostRows, slots_E: Tensor) -> None:
        """Computes the chosen experts that are in no slot, as their rows are copied from ``source`` into slots.

        These are the first of ``slots_E`` (int32), in ascending order of the experts.
        """
        missing = routed.plan.missing
        work = DeviceWork(missing.experts_W, slots_E, missing.count_1)
        kernels.moe_up_fill(routed.x_TH, self.weights, source, routed.plan, work, routed.act_RI, self._clamped_up)
        kernels.moe_down_fill(routed.act_RI, self.weights, source, routed.plan, work, routed.y_RH)

    def share(self, routed: Routed) -> Tensor | None:
        """The shared expert's output, None if there is none; the chosen experts need not be there for it."""
        return None if self.shared is None else self.shared(routed.x_TH)

    def combine(self, routed: Routed, shared_TH: Tensor | None) -> Tensor:
        """The block's output [T, H], from the results of all chosen experts and of the shared one."""
        y_RH, topk_ids_TK = routed.y_RH, routed.topk_ids_TK
        if self.clamped is not None:
            y_RH += self.clamped.down_bias_EH[topk_ids_TK.flatten()]
        return self.ops.moe_combine(y_RH.view(*topk_ids_TK.shape, -1), routed.topk_weights_TK, shared_TH)

    @property
    def _clamped_up(self) -> ClampedUp | None:
        return None if self.clamped is None else self.clamped.up

    @property
    def num_experts(self) -> int:
        """Experts that the router chooses from."""
        return self.router.config.num_experts

    @property
    def top_k(self) -> int:
        """Experts that the router chooses for a token."""
        return self.router.config.top_k

    @cached_property
    def _unknown_slots_E(self) -> Tensor:
        """A table without slots, for plans that are made before the lease says where the experts are."""
        weight_EH = self.router.projection.weight_NK
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
    up = ClampedUp(up_bias_E2I, config.alpha, config.limit)
    return ClampedExperts(up, tensors("down_proj_bias", num_experts, hidden))
