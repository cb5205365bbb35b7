"""Random quantized experts, and their weights written out element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.kernels.weights import ExpertFormat, Matrix

LAYOUTS = (
    (ExpertFormat.INT8, 0),
    (ExpertFormat.INT4, 32),
    (ExpertFormat.INT4, 64),
    (ExpertFormat.INT4, 128),
    (ExpertFormat.FP8, 0),
    (ExpertFormat.MXFP4, 0),
)


def fill_with_random_codes(matrix: Matrix, slot: int, generator: torch.Generator) -> None:
    """Every code that the format has, with scales that bring the weights near the size of a trained layer's."""
    data, scales = matrix.data_SNB[slot], matrix.scales_SGN[slot]
    codes = torch.randint(0, 256, data.shape, generator=generator, dtype=torch.uint8)
    if matrix.format is ExpertFormat.FP8:
        codes = codes.where((codes & 0x7F) != 0x7F, 0x35)
    data.copy_(codes.view(data.dtype))
    if matrix.format is ExpertFormat.MXFP4:
        scales.copy_(torch.randint(118, 126, scales.shape, generator=generator).to(torch.uint8))
    else:
        typical = {ExpertFormat.INT8: 80.0, ExpertFormat.INT4: 6.0, ExpertFormat.FP8: 100.0}[matrix.format]
        scales.copy_((0.5 + torch.rand(scales.shape, generator=generator)) / typical / matrix.inner**0.5)
    if matrix.zeros_SGN is not None:
        zeros = torch.randint(0, 17, scales.shape, generator=generator)
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
