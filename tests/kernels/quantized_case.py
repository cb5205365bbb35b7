"""Random quantized experts, and their weights written out element by element."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from duoserve.kernels.bf12 import room
from duoserve.kernels.weights import ExpertFormat, Matrix

LAYOUTS = (
    (ExpertFormat.INT8, 0),
    (ExpertFormat.INT4, 32),
    (ExpertFormat.INT4, 64),
    (ExpertFormat.INT4, 128),
    (ExpertFormat.FP8, 0),
    (ExpertFormat.MXFP4, 0),
    (ExpertFormat.BF12, 0),
)


def fill_with_random_codes(matrix: Matrix, slot: int, generator: torch.Generator) -> None:
    """Every code that the format has, with scales that bring the weights near the size of a trained layer's."""
    if matrix.format is ExpertFormat.BF12:
        _fill_with_random_bits(matrix, slot, generator)
        return
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


def _fill_with_random_bits(matrix: Matrix, slot: int, generator: torch.Generator) -> None:
    """BF12: a row uses from none to all places for escapes; but for them one in eight is of zeros."""
    inner, data_NB, scales_N = matrix.inner, matrix.data_SNB[slot], matrix.scales_SGN[slot, 0]
    num_rows, places, end = len(data_NB), room(matrix.inner), inner * 3 // 2
    rows_NB = torch.randint(0, 256, data_NB.shape, generator=generator, dtype=torch.uint8)
    top = 2.0 ** round(-22 - math.log2(inner) / 2)
    scales = top * 2.0 ** -torch.randint(0, 3, (num_rows,), generator=generator)
    scales[torch.rand(num_rows, generator=generator) < 1 / 8] = 0
    rows_NB[:, end : end + 4 * places] = 0
    escapes_NC = (128 * scales)[:, None].repeat(1, places).bfloat16()
    for n in range(num_rows):
        count = int(torch.randint(0, 1 + min(places, inner), (1,), generator=generator))
        columns = torch.randperm(inner, generator=generator)[:count]
        for place, column in enumerate(columns.tolist()):
            escapes_NC[n, place] = torch.randn(1, generator=generator) * 4 * inner**-0.5 * 10.0 ** -(place % 3 * 4)
            rows_NB[n, end + 2 * place], rows_NB[n, end + 2 * place + 1] = column % 256, column // 256
            rows_NB[n, column] = 0
            rows_NB[n, inner + column % (inner // 2)] &= 0xF0 if column < inner // 2 else 0x0F
    rows_NB[:, end + 2 * places : end + 4 * places] = escapes_NC.view(torch.uint8)
    data_NB.copy_(rows_NB)
    scales_N.copy_(scales)


def _bf12_row(row: list[int], scale: float, inner: int) -> list[float]:
    out = []
    for d in range(inner):
        exponent = row[inner + d % (inner // 2)] >> (4 * (d // (inner // 2))) & 15
        q = row[d] if row[d] < 128 else row[d] - 256
        out.append((128 + q if q >= 0 else q - 127) * 2.0**exponent * scale)
    places, end = room(inner), inner * 3 // 2
    for place in range(places):
        column = row[end + 2 * place] + 256 * row[end + 2 * place + 1]
        at = end + 2 * places + 2 * place
        weight = struct.unpack("<f", bytes([0, 0, *row[at : at + 2]]))[0]
        if weight != 128 * scale:
            out[column] = weight
    return out


def written_out(matrix: Matrix, slot: int) -> Tensor:
    """The weights [N, D] of one slot in float64, one element after another, from the table in weights.py."""
    num_rows, inner, group = matrix.data_SNB.shape[1], matrix.inner, max(matrix.group, 1)
    data, scales = matrix.data_SNB[slot].tolist(), matrix.scales_SGN[slot].tolist()
    zeros = matrix.zeros_SGN[slot].tolist() if matrix.zeros_SGN is not None else None
    if matrix.format is ExpertFormat.BF12:
        return torch.tensor([_bf12_row(data[n], scales[0][n], inner) for n in range(num_rows)], dtype=torch.float64)
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
