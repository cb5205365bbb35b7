"""Rows of the table tried on a GPU: checked against the present row's output, then timed in turn with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duoserve.kernels.configs import gemv_config
from duoserve.kernels.machine import machine
from duoserve.kernels.moe_gemm import choose_config, moe_down, moe_up
from duoserve.kernels.moe_gemv import moe_gemv_down, moe_gemv_up
from duoserve.kernels.route_sort import route_plan
from duoserve.kernels.routed_rows import RoutePlan
from gpu.ceilings import gpu_facts
from gpu.moe_operands import POOL_BYTES, Buffers, Pool, Step
from gpu.moe_paths import ROUNDING_ERROR, relative_error
from gpu.moe_shapes import MoEShape
from gpu.timing import Replay, times_us
from harness import Summary

Run = Callable[[], None]


class Trial:
    """One layer and its operands; ``times`` has the present row's microseconds, from every comparison with it."""

    def __init__(self, shape: MoEShape, tokens: int, format: str, device: str = "cuda") -> None:
        self.pool = Pool(shape, format, device, POOL_BYTES)
        l2_bytes = gpu_facts()["l2_bytes"]
        self.steps = [(step, route_plan(step.ids_TK, step.slots_E)) for step in self.pool.steps(tokens, l2_bytes)]
        self.single = self.pool.steps(1, l2_bytes) if format == "bf16" else []
        self.buffers = Buffers.of(self.steps[0][0], shape)
        self.out_1H = torch.empty_like(self.steps[0][0].x_TH[:1])
        self.arch, _ = machine(self.pool.rows_SB.device)
        self.times: dict[str, list[float]] = {}

    def inner(self, op: str) -> int:
        """The dimension that ``op`` sums over; of ``both`` the first one."""
        return self.pool.shape.intermediate if op.endswith("down") else self.pool.shape.hidden

    def present(self, op: str) -> Any:
        """The table's row; of ``both`` that of ``moe_up``, which ``moe_down`` shares."""
        (step, plan), weights = self.steps[0], self.pool.weights
        if op in ("moe_gemv_up", "moe_gemv_down"):
            return gemv_config(step.x_TH.dtype, self.arch, self.inner(op))
        return choose_config(step.x_TH, weights.w2 if op == "moe_down" else weights.w13, plan)

    def share_of(self, op: str) -> Callable[[Any], float]:
        """A timer of rows: their time over the present row's; inf for one that fails or computes something else.

        FloatingPointError where the present row computes no numbers, against which every other would be wrong.
        """
        row = self.present(op)
        expected, present = self._output(op, row), Replay(self._runs(op, row))
        if not expected.isfinite().all():
            raise FloatingPointError(f"the present row of {op} leaves NaN or infinities: no row can be held against it")
        self.times[op] = times_us({"present": present})["present"]

        def share(row: Any) -> float:
            try:
                if not relative_error(self._output(op, row), expected) <= ROUNDING_ERROR:
                    return math.inf
                played = times_us({"row": Replay(self._runs(op, row)), "present": present})
            except Exception:  # a row that does not compile or fit is no row
                torch.cuda.synchronize()
                return math.inf
            self.times[op] += played["present"]
            return Summary.of_pairs(played["row"], played["present"]).median

        return share

    def _prepare(self) -> None:
        """``act`` that ``moe_down`` can read, whatever a row of ``moe_up`` that failed has left there."""
        step, plan = self.steps[0]
        moe_up(step.x_TH, self.pool.weights, plan, plan.resident, self.buffers.act_RI)

    def _runs(self, op: str, row: Any) -> list[Run]:
        if op in ("moe_gemv_up", "moe_gemv_down"):
            slots = [step.slots_E[step.ids_TK[0]] for step in self.single]
            pairs = zip(self.single, slots, strict=True)
            return [lambda s=s, k=k: self._gemv(op, s, k, row) for s, k in pairs]
        return [lambda s=s, p=p: self._gemm(op, s, p, row) for s, p in self.steps]

    def _gemm(self, op: str, step: Step, plan: RoutePlan, row: Any) -> None:
        weights, buffers = self.pool.weights, self.buffers
        if op != "moe_down":
            moe_up(step.x_TH, weights, plan, plan.resident, buffers.act_RI, config=row)
        if op != "moe_up":
            moe_down(buffers.act_RI, weights, plan, plan.resident, buffers.y_RH, row)

    def _gemv(self, op: str, step: Step, slots_K: Tensor, row: Any) -> None:
        act_KI = self.buffers.act_RI[: len(slots_K)]
        if op == "moe_gemv_up":
            moe_gemv_up(step.x_TH, self.pool.weights, slots_K, act_KI, row)
        else:
            moe_gemv_down(act_KI, self.pool.weights, slots_K, step.topk_weights_TK, None, self.out_1H, row)

    def _output(self, op: str, row: Any) -> Tensor:
        """What the first step's run with ``row`` leaves in a buffer that was full of NaN."""
        written = self.out_1H if op == "moe_gemv_down" else self.buffers.y_RH
        if op in ("moe_up", "moe_gemv_up"):
            written = self.buffers.act_RI
            written = written[: self.pool.shape.top_k] if op == "moe_gemv_up" else written
        else:
            self._prepare()
        written.fill_(float("nan"))
        self._runs(op, row)[0]()
        return written.clone()
