"""Products with quantized weights on a CPU: codes are multiplied as they are, and scales are applied to the sums.

bfloat16 and float32 hold every code exactly, and every weight of MXFP4, so none is rounded. J rows of one expert,
N rows of its matrix, D its inner dimension, G groups of D, C codes of a half group.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from duoserve.kernels.int4_codes import code_dtype
from duoserve.kernels.matmul import power_of_two
from duoserve.kernels.reference_dequant import E2M1, row_scales, unpack
from duoserve.kernels.weights import FP8_BLOCK, ExpertFormat, Matrix

# Up to this many rows PyTorch's product with int8 weights, which converts them in registers, is faster. It takes only
# rows of whole vectors: it reads beyond the end of others.
PACKED_ROWS, PACKED_VECTOR = 8, 16
# The most sums of groups at a time, which limits the rows: all sums of a prompt would take more memory than its pass.
SUMS = 1 << 20


def multiplies_codes(matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether ``code_product`` takes the format, and inputs of ``dtype`` without loss; in float16 sums overflow."""
    whole_blocks = matrix.format is not ExpertFormat.FP8 or matrix.inner % FP8_BLOCK == 0
    quantized = matrix.format not in (ExpertFormat.FLOAT, ExpertFormat.BF12) and matrix.data_SNB.is_cpu
    return dtype is torch.bfloat16 and quantized and whole_blocks


def code_product(x_JD: Tensor, matrix: Matrix, slot: int, rows: slice) -> Tensor:
    """``x w^T`` [J, rows] in float32, of bfloat16 ``x_JD``; the sums of a group may be rounded to bfloat16."""
    assert matrix.scales_SGN is not None
    if matrix.order_SD is not None:
        x_JD = x_JD[:, matrix.order_SD[slot].long()]
    data_NB = matrix.data_SNB[slot, rows]
    if matrix.format is ExpertFormat.FP8:
        return _fp8_product(x_JD, data_NB, row_scales(matrix, slot, rows).T)
    scales_GN = matrix.scales_SGN[slot, :, rows]
    if matrix.format is ExpertFormat.INT8:
        return _int8_sums(x_JD, data_NB) * scales_GN
    if matrix.format is ExpertFormat.MXFP4:
        return _mxfp4_product(x_JD, data_NB, scales_GN)
    return _int4_product(x_JD, matrix, slot, rows)


def _int8_sums(x_JD: Tensor, q_ND: Tensor) -> Tensor:
    if len(x_JD) <= PACKED_ROWS and x_JD.shape[1] % PACKED_VECTOR == 0:
        return torch._weight_int8pack_mm(x_JD, q_ND, x_JD.new_ones(len(q_ND)))
    codes = code_dtype()
    return torch.mm(q_ND.to(codes), x_JD.T.to(codes)).T.float()


def _int4_product(x_JD: Tensor, matrix: Matrix, slot: int, rows: slice) -> Tensor:
    """As ``code_product``; the features of a group are in the order of their unpacked codes."""
    assert matrix.scales_SGN is not None
    codes_GNPC = matrix.int4_codes(*matrix.words_and_zeros(slot, rows))
    num_groups, _, num_places, _ = codes_GNPC.shape
    x_GJPC = x_JD.view(len(x_JD), num_groups, -1, num_places).permute(1, 0, 3, 2)
    return _scaled_sums(codes_GNPC.flatten(2), x_GJPC, matrix.scales_SGN[slot, :, rows].float())


def _fp8_product(x_JD: Tensor, data_ND: Tensor, scales_GN: Tensor) -> Tensor:
    """As ``code_product``; a block of columns is a group."""
    codes_GND, x_GJD = (
        rows.reshape(len(rows), -1, FP8_BLOCK).transpose(0, 1) for rows in (_looked_up(data_ND, ExpertFormat.FP8), x_JD)
    )
    return _scaled_sums(codes_GND, x_GJD, scales_GN)


def _mxfp4_product(x_JD: Tensor, data_NB: Tensor, scales_GN: Tensor) -> Tensor:
    """As ``code_product``; scales are powers of two, so bfloat16 holds the scaled weights."""
    scales_NG = scales_GN.T.contiguous().view(torch.float8_e8m0fnu).to(code_dtype())
    w_NGD = _looked_up(data_NB, ExpertFormat.MXFP4).view(*scales_NG.shape, -1) * scales_NG[:, :, None]
    return torch.mm(w_NGD.flatten(1), x_JD.T.to(w_NGD.dtype)).T.float()


def _scaled_sums(codes_GND: Tensor, x_GJ: Tensor, scales_GN: Tensor) -> Tensor:
    """The scaled sums [J, N] over G groups; ``x_GJ`` is [G, J, D], or [G, J, P, C] with D in P parts."""
    num_rows = power_of_two(SUMS // scales_GN.numel())
    if x_GJ.shape[1] <= num_rows:
        x_GDJ = x_GJ.flatten(2).transpose(1, 2).to(codes_GND.dtype)
        return torch.bmm(codes_GND, x_GDJ).float().mul_(scales_GN[..., None]).sum(0).T
    return torch.cat([_scaled_sums(codes_GND, part_GJ, scales_GN) for part_GJ in x_GJ.split(num_rows, dim=1)])


def _looked_up(bytes_NB: Tensor, form: ExpertFormat) -> Tensor:
    """The numbers [N, D] that bytes of fp8 or MXFP4 stand for, looked up two bytes at a time."""
    words = bytes_NB.flatten().view(torch.uint16).int()
    return _numbers(form).index_select(0, words).view(torch.bfloat16).view(len(bytes_NB), -1).to(code_dtype())


@cache
def _numbers(form: ExpertFormat) -> Tensor:
    """The bfloat16 numbers that each pair of bytes stands for, as one integer, which is fast to look up."""
    bytes_W2 = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.uint8).view(-1, 2)
    if form is ExpertFormat.FP8:
        return bytes_W2.view(torch.float8_e4m3fn).bfloat16().view(torch.int32).flatten()
    return torch.tensor(E2M1, dtype=torch.bfloat16, device="cpu")[unpack(bytes_W2).int()].view(torch.int64).flatten()
