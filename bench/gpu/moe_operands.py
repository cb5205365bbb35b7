"""Random experts in a slot pool, and decode or prefill steps over them, as the kernel bench and its tuner time them.

T tokens, K top-k, E experts, L layers, S slots, N rows of a matrix, H hidden, I expert intermediate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve.kernels.bf12 import LEAST, Bf12Rows
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix
from gpu.moe_shapes import MoEShape

# Far more than the L2 cache of any GPU: what little of it a replay leaves there does not flatter the next one.
POOL_BYTES = 2_000_000_000
L2_MULTIPLE = 3
STEPS = 16
SEED = 3
# Scales that give products of about the size of their inputs, as trained experts do.
TYPICAL_CODE = {ExpertFormat.INT4: 6.0, ExpertFormat.FP8: 100.0}


@dataclass(frozen=True)
class Step:
    """One pass through one layer: its tokens, their routing, and where that layer's experts are."""

    x_TH: Tensor
    ids_TK: Tensor
    topk_weights_TK: Tensor
    slots_E: Tensor
    layer: int

    def experts_used(self) -> int:
        """Distinct experts; waits for the device."""
        return len(self.ids_TK.unique())


class Pool:
    """The experts of some layers in slots of one pool, in an order that says nothing about them."""

    def __init__(self, shape: MoEShape, format: str, device: str, pool_bytes: int = POOL_BYTES) -> None:
        self.shape, self.format, self.device = shape, format, device
        self.generator = torch.Generator(device).manual_seed(SEED)
        layout = shape.layout(format)
        self.expert_bytes = layout.slot_bytes
        num_layers = max(1, -(-pool_bytes // (shape.experts * layout.slot_bytes)))
        num_slots = num_layers * shape.experts
        self.rows_SB = torch.zeros((num_slots, layout.slot_bytes), dtype=torch.uint8, device=device)
        self.weights: ExpertWeights = layout.weights(self.rows_SB)
        order = torch.randperm(num_slots, generator=self.generator, device=device)
        self.slots_LE = order.int().view(num_layers, shape.experts)
        for matrix in (self.weights.w13, self.weights.w2):
            for slot in range(num_slots):
                self._fill(matrix, slot)

    def steps(self, tokens: int, l2_bytes: int) -> list[Step]:
        """As many steps, from layer to layer, as make one round of them read 3 times the L2 cache or more."""
        per_step = self.shape.mean_experts(tokens) * self.expert_bytes
        many = 1 if per_step >= L2_MULTIPLE * l2_bytes and tokens > STEPS else STEPS
        count = max(many, int(-(-L2_MULTIPLE * l2_bytes // per_step)))
        return [self._step(tokens, number % len(self.slots_LE)) for number in range(count)]

    def contiguous(self) -> tuple[ExpertWeights, Tensor]:
        """Copies of FLOAT weights as two plain arrays in the experts' order, and the slots [L, E] that say so."""
        order = self.slots_LE.flatten().long()
        plain = ExpertWeights(self.weights.w13_SNH[order], self.weights.w2_SHI[order])
        return plain, torch.arange(len(order), dtype=torch.int32, device=self.device).view_as(self.slots_LE)

    def _step(self, tokens: int, layer: int) -> Step:
        shape = self.shape
        scores = torch.rand((tokens, shape.experts), generator=self.generator, device=self.device)
        weights_TK, ids_TK = scores.topk(shape.top_k, dim=1)
        x = torch.randn((tokens, shape.hidden), generator=self.generator, device=self.device)
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        return Step(x.bfloat16(), ids_TK.contiguous(), weights_TK.contiguous(), self.slots_LE[layer], layer)

    def _fill(self, matrix: Matrix, slot: int) -> None:
        data = matrix.data_SNB[slot]
        if matrix.format is ExpertFormat.FLOAT or matrix.scales_SGN is None:
            data.normal_(0.0, matrix.inner**-0.5, generator=self.generator)
            return
        data.random_(0, 256, generator=self.generator)
        if matrix.format is ExpertFormat.BF12:
            self._finish_bf12(matrix, slot)
            return
        if matrix.format is ExpertFormat.FP8:  # 0x7f and 0xff are NaN
            data.copy_(data.where((data & 0x7F) != 0x7F, 0x35))
        scales = matrix.scales_SGN[slot]
        uniform = torch.rand(scales.shape, generator=self.generator, device=self.device)
        scales.copy_((0.5 + uniform) / TYPICAL_CODE[matrix.format] / matrix.inner**0.5)
        if matrix.zeros_SGN is not None:
            matrix.zeros_SGN[slot].random_(4, 12, generator=self.generator)

    def _finish_bf12(self, matrix: Matrix, slot: int) -> None:
        """Any signs, mantissas and exponents, which are mostly the upper ones; no escapes, which few rows have."""
        assert matrix.scales_SGN is not None
        scale = 2.0 ** -round(20 + math.log2(matrix.inner) / 2)
        matrix.scales_SGN[slot].fill_(scale)
        rows = Bf12Rows.of(matrix.data_SNB[slot], matrix.scales_SGN[slot, 0], matrix.inner)
        rows.columns_NC.zero_()
        rows.escapes_NC.fill_(LEAST * scale)


@dataclass(frozen=True)
class Buffers:
    """What the kernels of one step write: act [R, I] and y [R, H], R = T * K; full of NaN to begin with."""

    act_RI: Tensor
    y_RH: Tensor

    @classmethod
    def of(cls, step: Step, shape: MoEShape) -> Buffers:
        """For one step; steps of one size can share them."""
        rows = step.ids_TK.numel()
        sizes = (rows, shape.intermediate), (rows, shape.hidden)
        return cls(*(torch.full(size, float("nan"), dtype=step.x_TH.dtype, device=step.x_TH.device) for size in sizes))


def bytes_of(steps: list[Step], expert_bytes: int) -> float:
    """Weight bytes that a step must read, the mean over ``steps``."""
    return expert_bytes * sum(step.experts_used() for step in steps) / len(steps)
