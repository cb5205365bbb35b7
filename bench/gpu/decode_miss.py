"""One decode miss: an expert that is in no slot when a token wants it, read through or copied before it is computed.

T tokens, K top-k, E experts, S slots, B bytes of a row, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from duoserve.kernels import reference
from duoserve.kernels.copies import page_gather
from duoserve.kernels.host_rows import HostRows
from duoserve.kernels.moe_fill import moe_down_fill, moe_up_fill
from duoserve.kernels.moe_gemm import moe_down, moe_up
from duoserve.kernels.routed_rows import HostWork
from gpu.moe_operands import Buffers, Pool, Step
from gpu.moe_paths import ROUNDING_ERROR, Check, relative_error

MAX_MISSES, HOST_BYTES = 64, 200_000_000


class Miss:
    """One step whose first expert is missing, in many variants: each reads another pinned row into another slot."""

    def __init__(self, pool: Pool, step: Step) -> None:
        self.pool, self.step = pool, step
        expert = int(step.ids_TK[0].min())
        self.count = max(1, min(MAX_MISSES, len(pool.rows_SB), HOST_BYTES // pool.expert_bytes))
        rows_SB = pool.rows_SB[: self.count].to("cpu", copy=True)
        self.host_SB = rows_SB.pin_memory() if pool.device == "cuda" else rows_SB
        self.plan = reference.route_plan(step.ids_TK, torch.full_like(step.slots_E, -1))
        self.buffers = Buffers.of(step, pool.shape)
        self.works = [HostWork.of([(expert, slot)], pool.device) for slot in range(self.count)]
        self.sources = [self._source(expert, row_B) for row_B in self.host_SB]

    def _source(self, expert: int, row_B: Tensor) -> HostRows:
        rows: list[Tensor | None] = [None] * len(self.step.slots_E)
        rows[expert] = row_B
        return HostRows.of(rows, self.pool.device)

    def read_through(self, number: int) -> None:
        """The kernels read the host's row, compute with it and fill the slot."""
        work, source, weights = self.works[number], self.sources[number], self.pool.weights
        moe_up_fill(self.step.x_TH, weights, source, self.plan, work, self.buffers.act_RI)
        moe_down_fill(self.buffers.act_RI, weights, source, self.plan, work, self.buffers.y_RH)

    def copy_then_launch(self, number: int) -> None:
        """The copy engine fills the slot, then the kernels compute from it."""
        self.pool.rows_SB[number].copy_(self.host_SB[number], non_blocking=True)
        self._launch(number)

    def gather_then_launch(self, number: int) -> None:
        """A kernel fills the slot, then the others compute from it."""
        page_gather(self.sources[number], self.works[number], self.pool.rows_SB)
        self._launch(number)

    def _launch(self, number: int) -> None:
        work, weights = self.works[number], self.pool.weights
        moe_up(self.step.x_TH, weights, self.plan, work, self.buffers.act_RI)
        moe_down(self.buffers.act_RI, weights, self.plan, work, self.buffers.y_RH)

    def checks(self) -> list[Check]:
        """Every way leaves the host's bytes in the slot and the same numbers in the expert's row."""
        copied_w, copied_y = self._left_by(self.copy_then_launch)
        row, checks = int(self.plan.order_R[0]), []
        for name, way in (("read-through", self.read_through), ("page_gather", self.gather_then_launch)):
            w, y = self._left_by(way)
            checks.append(Check(f"the slot that {name} fills", float(not torch.equal(w, copied_w)), 0.0))
            checks.append(Check(name, relative_error(y[row], copied_y[row]), ROUNDING_ERROR))
        return checks

    def _left_by(self, way: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """The bytes of the first slot's weights and scales, and y [R, H]; both are full of NaN before."""
        self.pool.rows_SB[0].fill_(0xFF)
        self.buffers.y_RH.fill_(float("nan"))
        way(0)
        parts = [*self.pool.weights.w13.parts, *self.pool.weights.w2.parts]
        return torch.cat([part[0].flatten().view(torch.uint8) for part in parts]), self.buffers.y_RH.clone()
