"""RMSNorm, alone or with the residual sum before it, in Triton.

T rows, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_one_device, check_tensor, require
from duoserve.kernels.limits import MAX_NORMED
from duoserve.kernels.numerics import TRITON_DTYPES, interpreting, to_dtype

FLOATS = tuple(TRITON_DTYPES)
# Narrow rows (the norms of single heads) share a program, up to this many elements.
TILE_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    sum_ptr,
    num_rows,
    num_columns,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total = to_dtype(x, dtype, INTERPRET)
        tl.store(sum_ptr + rows * num_columns + columns, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / num_columns + eps)
    normed = to_dtype(x * scale, dtype, INTERPRET).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(normed_ptr + rows * num_columns + columns, to_dtype(normed * weight, dtype, INTERPRET), mask=inside)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """As the twin in reference_small.py -> [..., H], contiguous.

    ``x_TH`` has any shape [..., H] and float32, float16 or bfloat16; the weight has its dtype; H is at most MAX_NORMED.
    A row's bits do not depend on the other rows. Raises KernelError for other shapes and dtypes.
    """
    rows_TH = _rows(x_TH)
    _check(rows_TH, weight_H)
    normed_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    _launch(rows_TH, None, weight_H, eps, normed_TH, normed_TH)
    return normed_TH


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the twin in reference_small.py -> (normed, sum), both [T, H] and contiguous; limits as for ``rms_norm``.

    The sum is a new tensor: neither input changes.
    """
    check_tensor("x", x_TH, (None, None), FLOATS)
    check_tensor("residual", residual_TH, tuple(x_TH.shape), (x_TH.dtype,))
    check_one_device(x=x_TH, residual=residual_TH)
    rows_TH, residual_rows_TH = _rows(x_TH), _rows(residual_TH)
    _check(rows_TH, weight_H)
    normed_TH, sum_TH = (torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device) for _ in range(2))
    _launch(rows_TH, residual_rows_TH, weight_H, eps, normed_TH, sum_TH)
    return normed_TH, sum_TH


def _rows(x_TH: Tensor) -> Tensor:
    """``x`` as rows with contiguous elements; a copy only if no view has that form."""
    rows_TH = x_TH.reshape(-1, x_TH.shape[-1])
    return rows_TH if rows_TH.stride(1) == 1 else rows_TH.contiguous()


def _check(x_TH: Tensor, weight_H: Tensor) -> None:
    check_tensor("x", x_TH, (None, None), FLOATS)
    hidden = x_TH.shape[1]
    require(0 < hidden <= MAX_NORMED, f"x has rows of {hidden} elements; they must have 1 to {MAX_NORMED}")
    check_tensor("weight", weight_H, (hidden,), (x_TH.dtype,))
    require(weight_H.is_contiguous(), f"weight must be contiguous; its strides are {weight_H.stride()}")
    check_one_device(x=x_TH, weight=weight_H)


def _launch(
    x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, eps: float, normed_TH: Tensor, sum_TH: Tensor
) -> None:
    num_rows, hidden = x_TH.shape
    columns = triton.next_power_of_2(hidden)
    rows = max(1, TILE_ELEMENTS // columns)
    if num_rows:
        _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x_TH,
            x_TH if residual_TH is None else residual_TH,
            weight_H,
            normed_TH,
            sum_TH,
            num_rows,
            hidden,
            x_TH.stride(0),
            0 if residual_TH is None else residual_TH.stride(0),
            eps,
            HAS_RESIDUAL=residual_TH is not None,
            ROWS=rows,
            COLUMNS=columns,
            INTERPRET=interpreting(),
            # 8 elements (16 bytes of a half type) a thread, up to 16 warps; the widest rows have 32 warps.
            num_warps=32 if columns > 16384 else min(16, max(4, columns // 256)),
        )
