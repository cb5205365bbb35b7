"""Products with int8 and int4 weights on a CPU: codes are multiplied as they are, and scales applied to the sums.

bfloat16 and float32 hold every code exactly, so no weight is rounded, and a matrix is read once, not written out as
floats and read again. R rows, N rows of the matrix, D its inner dimension, G groups of D, C codes of a half group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.kernels.matmul import has_native_matmul
from duoserve.kernels.weights import ExpertFormat, Matrix

# Up to here PyTorch's product with int8 weights, which converts them in registers, is the faster one. It takes rows of
# whole vectors only: of others it reads beyond the end.
PACKED_ROWS, PACKED_VECTOR = 8, 16


def multiplies_codes(matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether ``code_product`` knows the format, and loses nothing of inputs of ``dtype``; float16's sums overflow."""
    return dtype is torch.bfloat16 and matrix.format in (ExpertFormat.INT8, ExpertFormat.INT4)


def code_product(x_RD: Tensor, matrix: Matrix, slot: int, rows: slice) -> Tensor:
    """``x w^T`` [R, rows] in float32, of bfloat16 ``x_RD``; the sums of a group may be rounded to bfloat16."""
    assert matrix.scales_SGN is not None
    if matrix.order_SD is not None:
        x_RD = x_RD[:, matrix.order_SD[slot].long()]
    data_NB, scales_GN = matrix.data_SNB[slot, rows], matrix.scales_SGN[slot, :, rows].float()
    if matrix.format is ExpertFormat.INT8:
        return _int8_sums(x_RD, data_NB) * scales_GN
    assert matrix.zeros_SGN is not None
    return _int4_product(x_RD, data_NB, scales_GN, matrix.zeros_SGN[slot, :, rows])


def _int8_sums(x_RD: Tensor, q_ND: Tensor) -> Tensor:
    if len(x_RD) <= PACKED_ROWS and x_RD.shape[1] % PACKED_VECTOR == 0:
        return torch._weight_int8pack_mm(x_RD, q_ND, x_RD.new_ones(len(q_ND)))
    codes = _code_dtype()
    return torch.mm(q_ND.to(codes), x_RD.T.to(codes)).T.float()


def _int4_product(x_RD: Tensor, data_NB: Tensor, scales_GN: Tensor, zeros_GN: Tensor) -> Tensor:
    """Even features are in the low halves of bytes, odd ones in the high; of a group, all even ones come first here."""
    num_groups, num_rows = scales_GN.shape
    bytes_NGC = data_NB.view(num_rows, num_groups, -1)
    zeros_NG1 = zeros_GN.T.contiguous().view(torch.int8)[:, :, None]
    codes_GN2C = torch.empty(num_groups, num_rows, 2, bytes_NGC.shape[2], dtype=_code_dtype())
    for parity, half_NGC in enumerate((bytes_NGC & 15, bytes_NGC >> 4)):
        codes_GN2C[:, :, parity] = half_NGC.view(torch.int8).sub_(zeros_NG1).transpose(0, 1)
    x_G2CR = x_RD.to(codes_GN2C.dtype).view(len(x_RD), num_groups, -1, 2).permute(1, 3, 2, 0)
    sums_GNR = torch.bmm(codes_GN2C.flatten(2), x_G2CR.flatten(1, 2))
    return (sums_GNR * scales_GN[..., None]).sum(0).T


def _code_dtype() -> torch.dtype:
    return torch.bfloat16 if has_native_matmul(torch.bfloat16) else torch.float32
