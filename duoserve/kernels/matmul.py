"""``y = x w^T``, whatever the dtype, by the fastest exact route of this machine; a GPU has but one.

T tokens, K input features, N output features.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to here a product in half precision streams each weight once per row and memory sets the pace; beyond it, widening
# the weights to float32 once and using the float32 units wins (measured on AVX2, where half has no units of its own).
NARROW_ROWS = 6
# Weight elements widened at a time: 4 MiB of float32 stay in the last-level cache until the product has read them.
WIDEN_ELEMENTS = 1 << 20


@cache
def has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` in hardware."""
    if dtype in (torch.float32, torch.float64):
        return True
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    names = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}[dtype]
    return any(capabilities.get(name, False) for name in names)


def linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x_TK @ w_NK.T + bias_N`` -> [T, N] in ``x_TK``'s dtype, accumulated in at least float32.

    The route depends on T, the dtype and the machine only, so equal inputs give equal bits.
    """
    if x_TK.is_cuda or x_TK.shape[0] <= NARROW_ROWS or has_native_matmul(w_NK.dtype):
        return F.linear(x_TK, w_NK, bias_N)
    wide_TN = _widened(x_TK, w_NK)
    return (wide_TN if bias_N is None else wide_TN.add_(bias_N)).to(x_TK.dtype)


def _widened(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """The float32 product, with the weights widened a block of rows at a time."""
    num_out, num_in = w_NK.shape
    rows = max(1, WIDEN_ELEMENTS // num_in)
    scratch_BK = torch.empty(min(rows, num_out), num_in)
    x_wide_TK, out_TN = x_TK.float(), torch.empty(len(x_TK), num_out)
    for start in range(0, num_out, rows):
        block_BK = w_NK[start : start + rows]
        wide_BK = scratch_BK[: len(block_BK)].copy_(block_BK)
        torch.mm(x_wide_TK, wide_BK.T, out=out_TN[:, start : start + rows])
    return out_TN
