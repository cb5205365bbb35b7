"""One decode miss: an expert that is in no slot when a token wants it, read through or copied before it is computed.

T tokens, K top-k, E experts, S slots, I expert intermediate.
"""

from __future__ import annotations

import torch
from moe_operands import Buffers, Pool, Step
from moe_paths import Check

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
        pinned = pool.device == "cuda"
        self.host_SB = pool.rows_SB[:count].cpu().pin_memory() if pinned else pool.rows_SB[:count].cpu()
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

    def check(self) -> Check:
        """Both ways leave the host's bytes in the slot and, in the expert's row, the same numbers."""
        self.pool.rows_SB[0].fill_(0xFF)
        self.buffers.y_RH.fill_(float("nan"))
        self.read_through(0)
        w13, w2 = (w[0].clone() for w in (self.pool.weights.w13_SNH, self.pool.weights.w2_SHI))
        filled = self.buffers.y_RH.clone()
        self.buffers.y_RH.fill_(float("nan"))
        self.copy_then_launch(0)
        same = torch.equal(w13, self.pool.weights.w13_SNH[0]) and torch.equal(w2, self.pool.weights.w2_SHI[0])
        same = same and torch.equal(filled.nan_to_num(7.0), self.buffers.y_RH.nan_to_num(7.0))
        same = same and not bool(filled.isnan().all())
        return Check("read-through equals copy-then-launch", float(not same), 0.0)
