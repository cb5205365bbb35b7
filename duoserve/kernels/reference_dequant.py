"""Decodes the quantized formats in PyTorch, exactly as their specifications say.

N rows of a matrix, D its inner dimension, G groups of D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.kernels.bf12 import Bf12Rows
from duoserve.kernels.weights import FP8_BLOCK, ExpertFormat, Matrix

# e2m1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


ALL_ROWS = slice(None)


def dense(matrix: Matrix, slot: int, rows: slice = ALL_ROWS) -> Tensor:
    """The weights [N, D] in ``slot``, or some rows of them: FLOAT as they are, BF12 in bfloat16, others in float32.

    For fp8 and int8 they are the rounded float32 product of code and scale; values of the other formats are exact.
    """
    if matrix.format is ExpertFormat.FLOAT:
        return matrix.data_SNB[slot, rows]
    values_ND = _decoded(matrix, slot, rows)
    if matrix.order_SD is None:
        return values_ND
    return torch.empty_like(values_ND).index_copy_(1, matrix.order_SD[slot].long(), values_ND)


def _decoded(matrix: Matrix, slot: int, rows: slice) -> Tensor:
    """The weights in float32, columns in the order in which they are stored."""
    assert matrix.scales_SGN is not None
    data_NB, scales = matrix.data_SNB[slot, rows], matrix.scales_SGN[slot]
    if matrix.format is ExpertFormat.FP8:
        scales_ND = row_scales(matrix, slot, rows).repeat_interleave(FP8_BLOCK, dim=1)[:, : matrix.inner]
        return data_NB.view(torch.float8_e4m3fn).float() * scales_ND
    scales_GN = scales[:, rows]
    if matrix.format is ExpertFormat.INT8:
        return data_NB.float() * scales_GN[0][:, None]
    if matrix.format is ExpertFormat.BF12:
        return matrix.unpack(Bf12Rows.of(data_NB, scales_GN[0], matrix.inner))
    codes_ND = unpack(data_NB)
    if matrix.format is ExpertFormat.MXFP4:
        values_ND = torch.tensor(E2M1, dtype=torch.float32, device=data_NB.device)[codes_ND.int()]
        return values_ND * _per_element(scales_GN.view(torch.float8_e8m0fnu).float(), matrix.group)
    assert matrix.zeros_SGN is not None
    offset_ND = codes_ND.float() - _per_element(matrix.zeros_SGN[slot][:, rows].float(), matrix.group)
    return offset_ND * _per_element(scales_GN.float(), matrix.group)


def unpack(bytes_NB: Tensor) -> Tensor:
    """Two 4-bit codes of every byte, the low one first: uint8 [N, D]."""
    return torch.stack((bytes_NB & 15, bytes_NB >> 4), dim=-1).flatten(1)


def row_scales(matrix: Matrix, slot: int, rows: slice = ALL_ROWS) -> Tensor:
    """The scales [N, blocks of D] of rows of fp8, which has them for 128 x 128 blocks."""
    assert matrix.scales_SGN is not None
    scales, num_rows = matrix.scales_SGN[slot], matrix.data_SNB.shape[1]
    rows_N = torch.arange(num_rows, device=scales.device)[rows]
    blocks_N = rows_N // 2 // FP8_BLOCK * 2 + rows_N % 2 if matrix.interleaved else rows_N // FP8_BLOCK
    return scales[blocks_N]


def _per_element(values_GN: Tensor, group: int) -> Tensor:
    return values_GN.T.repeat_interleave(group, dim=1)
