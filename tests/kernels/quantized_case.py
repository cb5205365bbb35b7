"""Random quantized experts: codes and scales in a poisoned pool, and their weights written out element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.kernels import ExpertWeights, RoutePlan, reference
from duoserve.kernels.weights import ExpertFormat, Matrix, QuantizedLayout
from tests.kernels.common import DEVICE, POISON
from tests.kernels.experts_case import SPARE_SLOTS

LAYOUTS = (
    (ExpertFormat.INT8, 0),
    (ExpertFormat.INT4, 32),
    (ExpertFormat.INT4, 64),
    (ExpertFormat.INT4, 128),
    (ExpertFormat.FP8, 0),
    (ExpertFormat.MXFP4, 0),
)


class QuantizedCase:
    """``plan`` has some experts missing; ``slots_E`` says where all of them are."""

    def __init__(
        self, layout: QuantizedLayout, tokens: int, top_k: int, experts: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rows_SB = torch.full((experts + SPARE_SLOTS, layout.slot_bytes), POISON, dtype=torch.uint8)
        self.slots_E = torch.randperm(experts + SPARE_SLOTS, generator=self.generator)[:experts].int()
        filled = layout.weights(self.rows_SB)
        for slot in self.slots_E.tolist():
            self._fill(filled.w13, slot)
            self._fill(filled.w2, slot)
        self.on_host: ExpertWeights = filled
        self.device_rows_SB = self.rows_SB.to(DEVICE)
        self.weights = layout.weights(self.device_rows_SB)
        self.ids_TK = torch.rand(tokens, experts, generator=self.generator).argsort(1)[:, :top_k].contiguous()
        self.x_TH = self._random(tokens, layout.hidden).to(dtype).to(DEVICE)
        known = self.slots_E.where(torch.rand(experts, generator=self.generator) < 0.5, -1)
        self.plan: RoutePlan = reference.route_plan(self.ids_TK.to(DEVICE), known.to(DEVICE))

    def untouched(self) -> bool:
        """No kernel has written to the pool."""
        return torch.equal(self.device_rows_SB.cpu(), self.rows_SB)

    def truth(self, x_RD: Tensor, w_END: Tensor) -> Tensor:
        """float64 products of the sorted rows with their experts' weights."""
        experts = self.ids_TK.flatten()[self.plan.order_N.cpu().long()]
        return torch.einsum("rnd,rd->rn", w_END[experts], x_RD.cpu().double())

    def by_expert(self, matrix: Matrix) -> Tensor:
        """float64 [E, N, D]."""
        return torch.stack([written_out(matrix, slot) for slot in self.slots_E.tolist()])

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _fill(self, matrix: Matrix, slot: int) -> None:
        data, scales = matrix.data_SNB[slot], matrix.scales_SGN[slot]
        codes = torch.randint(0, 256, data.shape, generator=self.generator, dtype=torch.uint8)
        if matrix.format is ExpertFormat.FP8:
            codes = codes.where((codes & 0x7F) != 0x7F, 0x35)
        data.copy_(codes.view(data.dtype))
        if matrix.format is ExpertFormat.MXFP4:
            scales.copy_(torch.randint(118, 126, scales.shape, generator=self.generator).to(torch.uint8))
        else:
            typical = {ExpertFormat.INT8: 80.0, ExpertFormat.INT4: 6.0, ExpertFormat.FP8: 100.0}[matrix.format]
            scales.copy_((0.5 + torch.rand(scales.shape, generator=self.generator)) / typical / matrix.inner**0.5)
        if matrix.zeros_SGN is not None:
            zeros = torch.randint(0, 17, scales.shape, generator=self.generator)
            matrix.zeros_SGN[slot].copy_(zeros.to(torch.uint8))


def written_out(matrix: Matrix, slot: int) -> Tensor:
    """The weights [N, D] of one slot in float64, one element after another, from the table in weights.py."""
    num_rows, inner, group = matrix.data_SNB.shape[1], matrix.inner, max(matrix.group, 1)
    data, scales = matrix.data_SNB[slot].tolist(), matrix.scales_SGN[slot].tolist()
    zeros = matrix.zeros_SGN[slot].tolist() if matrix.zeros_SGN is not None else None
    out = torch.empty(num_rows, inner, dtype=torch.float64)
    for n in range(num_rows):
        for d in range(inner):
            code = data[n][d // 2] >> 4 * (d % 2) & 15 if matrix.format.packs_two else data[n][d]
            if matrix.format is ExpertFormat.INT8:
                value = code * scales[0][n]
            elif matrix.format is ExpertFormat.INT4:
                value = (code - zeros[d // group][n]) * scales[d // group][n]
            elif matrix.format is ExpertFormat.MXFP4:
                value = minifloat(code, 2, 1, 1) * 2.0 ** (scales[d // 32][n] - 127)
            else:
                block = 2 * (n // 2 // 128) + n % 2 if matrix.interleaved else n // 128
                value = minifloat(code, 4, 3, 7) * scales[block][d // 128]
            out[n, d] = value
    return out


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a small float without infinities."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) & 1 else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
