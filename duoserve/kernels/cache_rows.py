"""The write of whole rows, such as those of latent attention, to a paged cache.

T tokens, W elements of a row, P pages, S tokens a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.numerics import TRITON_DTYPES

FLOATS = tuple(TRITON_DTYPES)
# 1024 columns a program: 8 elements (16 bytes of a half type) for each of the 128 threads of its 4 warps.
COLUMNS = 1024


@triton.jit
def _write_rows_kernel(values_ptr, pages_ptr, rows_ptr, values_stride, num_columns, COLUMNS: tl.constexpr):
    """Programs (token, block of columns)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(rows_ptr + token)
    stored = columns < tl.where(row >= 0, num_columns, 0)  # not `&`: see rope.py
    values = tl.load(values_ptr + token * values_stride + columns, mask=stored, other=0.0)
    tl.store(pages_ptr + row * num_columns + columns, values, mask=stored)


def write_rows(values_TW: Tensor, pages_PSW: Tensor, rows_T: Tensor) -> None:
    """As the twin in reference_small.py; it runs alike whatever the rows are, so a recorded step may contain it.

    Values and pages have one dtype: float32, float16 or bfloat16. Each token's values are contiguous, and so are all
    pages; rows are int64. Raises KernelError otherwise. Rows must be below P * S, which is not checked.
    """
    check_tensor("values", values_TW, (None, None), FLOATS)
    num_tokens, num_columns = values_TW.shape
    check_tensor("pages", pages_PSW, (None, None, num_columns), (values_TW.dtype,))
    check_tensor("rows", rows_T, (num_tokens,), (torch.int64,))
    check_contiguous(pages=pages_PSW, rows=rows_T)
    check_one_device(values=values_TW, pages=pages_PSW, rows=rows_T)
    require(values_TW.stride(1) == 1, f"each row of values must be contiguous; its strides are {values_TW.stride()}")
    if values_TW.numel():
        grid = (num_tokens, triton.cdiv(num_columns, COLUMNS))
        _write_rows_kernel[grid](
            values_TW, pages_PSW, rows_T, values_TW.stride(0), num_columns, COLUMNS=COLUMNS, num_warps=4
        )
