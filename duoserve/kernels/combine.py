"""The sum of a token's expert outputs, in Triton.

T tokens, K top-k, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.numerics import TRITON_DTYPES, interpreting, to_dtype

FLOATS = tuple(TRITON_DTYPES)

# 1024 columns a program: 8 elements (16 bytes of a half type) for each of the 128 threads of its 4 warps.
COLUMNS = 1024


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    shared_ptr,
    out_ptr,
    y_stride,
    shared_stride,
    num_columns,
    K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    out = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(K):
        y = tl.load(y_ptr + token * y_stride + j * num_columns + columns, mask=inside, other=0.0)
        out += y.to(tl.float32) * tl.load(weights_ptr + token * K + j)
    if HAS_SHARED:
        out += tl.load(shared_ptr + token * shared_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * num_columns + columns, to_dtype(out, out_ptr.dtype.element_ty, INTERPRET), mask=inside)


def moe_combine(y_TKH: Tensor, topk_weights_TK: Tensor, shared_TH: Tensor | None = None) -> Tensor:
    """As the twin in reference_small.py, with its bits: products and sums are rounded one by one, never fused.

    ``y_TKH`` is float32, float16 or bfloat16 with each token contiguous; the weights are float32; ``shared_TH`` has
    ``y``'s dtype. Raises KernelError otherwise.
    """
    _check(y_TKH, topk_weights_TK, shared_TH)
    tokens, top_k, hidden = y_TKH.shape
    out_TH = torch.empty((tokens, hidden), dtype=y_TKH.dtype, device=y_TKH.device)
    if out_TH.numel():
        _combine_kernel[(tokens, triton.cdiv(hidden, COLUMNS))](
            y_TKH,
            topk_weights_TK,
            shared_TH if shared_TH is not None else y_TKH,
            out_TH,
            y_TKH.stride(0),
            shared_TH.stride(0) if shared_TH is not None else 0,
            hidden,
            K=top_k,
            HAS_SHARED=shared_TH is not None,
            COLUMNS=COLUMNS,
            INTERPRET=interpreting(),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out_TH


def _check(y_TKH: Tensor, topk_weights_TK: Tensor, shared_TH: Tensor | None) -> None:
    check_tensor("y", y_TKH, (None, None, None), FLOATS)
    tokens, top_k, hidden = y_TKH.shape
    require(tokens == 0 or y_TKH[0].is_contiguous(), f"y[t] must be contiguous; y's strides are {y_TKH.stride()}")
    check_tensor("topk_weights", topk_weights_TK, (tokens, top_k), (torch.float32,))
    check_contiguous(topk_weights=topk_weights_TK)
    check_one_device(y=y_TKH, topk_weights=topk_weights_TK)
    if shared_TH is not None:
        check_tensor("shared", shared_TH, (tokens, hidden), (y_TKH.dtype,))
        check_one_device(y=y_TKH, shared=shared_TH)
        require(shared_TH.stride(1) == 1, f"shared[t] must be contiguous; its strides are {shared_TH.stride()}")
