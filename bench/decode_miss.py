"""One decode miss: an expert that is in no slot when a token wants it, read through or copied before it is computed.

T tokens, K top-k, E experts, S slots, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from moe_operands import Buffers, Pool, Step
from moe_paths import ROUNDING_ERROR, Check, relative_error

from duoserve.kernels import reference
from duoserve.kernels.moe_fill import moe_down_fill, moe_up_fill
from duoserve.kernels.moe_gemm import moe_down, moe_up
from duoserve.kernels.routing import Work

MAX_MISSES, HOST_BYTES = 16, 400_000_000


class Miss:
    """One step whose first expert is missing, in many variants: each reads another pinned row into another slot."""

    def __init__(self, pool: Pool, step: Step) -> None:
        self.pool, self.step = pool, step
        expert = int(step.ids_TK[0].min())
        count = max(1, min(MAX_MISSES, len(pool.rows_SB), HOST_BYTES // pool.expert_bytes))
        rows_SB = pool.rows_SB[:count].to("cpu", copy=True)
        self.host_SB = rows_SB.pin_memory() if pool.device == "cuda" else rows_SB
        self.plan = reference.route_plan(step.ids_TK, torch.full_like(step.slots_E, -1))
        self.buffers = Buffers.of(step, pool.shape)
        self.works = [Work.of([(expert, slot)], pool.device) for slot in range(count)]
        self.addresses = [self._addresses(expert, row) for row in range(count)]

    def _addresses(self, expert: int, row: int) -> torch.Tensor:
        addresses_E = torch.zeros(len(self.step.slots_E), dtype=torch.int64)
        addresses_E[expert] = self.host_SB[row].data_ptr()
        return addresses_E.to(self.pool.device)

    def read_through(self, number: int) -> None:
        """The kernels read the host's row, compute with it and fill the slot."""
        work, addresses_E, weights = self.works[number], self.addresses[number], self.pool.weights
        moe_up_fill(self.step.x_TH, weights, addresses_E, self.plan, work, self.buffers.act_RI)
        moe_down_fill(self.buffers.act_RI, weights, addresses_E, self.plan, work, self.buffers.y_RH)

    def copy_then_launch(self, number: int) -> None:
        """The copy engine fills the slot, then the kernels compute from it."""
        self.pool.rows_SB[number].copy_(self.host_SB[number], non_blocking=True)
        work, weights = self.works[number], self.pool.weights
        moe_up(self.step.x_TH, weights, self.plan, work, self.buffers.act_RI)
        moe_down(self.buffers.act_RI, weights, self.plan, work, self.buffers.y_RH)

    def checks(self) -> list[Check]:
        """Both ways leave the host's bytes in the slot and the same numbers in the expert's row."""
        filled_w, filled_y = self._left_by(self.read_through)
        copied_w, copied_y = self._left_by(self.copy_then_launch)
        row = int(self.plan.order_N[0])
        return [
            Check("the slot that read-through fills", float(not torch.equal(filled_w, copied_w)), 0.0),
            Check("read-through", relative_error(filled_y[row], copied_y[row]), ROUNDING_ERROR),
        ]

    def _left_by(self, way: Callable[[int], None]) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights in the first slot and y [R, H], both full of NaN before."""
        self.pool.rows_SB[0].fill_(0xFF)
        self.buffers.y_RH.fill_(float("nan"))
        way(0)
        weights = self.pool.weights
        return torch.cat((weights.w13_SNH[0].flatten(), weights.w2_SHI[0].flatten())), self.buffers.y_RH.clone()
