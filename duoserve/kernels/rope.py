"""Rotary embedding of queries and keys and the write of keys and values into the paged cache, in one launch.

T tokens, H query heads, G KV heads, D head dimension, R rotated dimensions, P pages, S tokens a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.numerics import TRITON_DTYPES, interpreting, to_dtype

FLOATS = tuple(TRITON_DTYPES)
# Elements a program: 8 heads of 128 dimensions, 16 bytes of a half type for each of 128 threads.
TILE_ELEMENTS = 1024


@triton.jit
def _rotate(
    from_ptr,
    to_ptr,
    cos_R,
    sin_R,
    inside_H,
    offsets_in_H,
    offsets_out_H,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Some heads of one token: the first 2 * HALF dimensions turned, the others copied."""
    dtype: tl.constexpr = to_ptr.dtype.element_ty
    pairs = tl.arange(0, HALF_PAD)[None, :]
    low_at = pairs * 2 if INTERLEAVED else pairs
    high_at = low_at + (1 if INTERLEAVED else HALF)
    mask = inside_H & (pairs < HALF)
    low = tl.load(from_ptr + offsets_in_H + low_at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(from_ptr + offsets_in_H + high_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(to_ptr + offsets_out_H + low_at, to_dtype(low * cos_R - high * sin_R, dtype, INTERPRET), mask=mask)
    tl.store(to_ptr + offsets_out_H + high_at, to_dtype(high * cos_R + low * sin_R, dtype, INTERPRET), mask=mask)
    if D > 2 * HALF:
        rest_at = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        rest_mask = inside_H & (rest_at < D)
        rest = tl.load(from_ptr + offsets_in_H + rest_at, mask=rest_mask, other=0.0)
        tl.store(to_ptr + offsets_out_H + rest_at, rest, mask=rest_mask)


@triton.jit
def _rope_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    k_pages_ptr,
    v_pages_ptr,
    rows_ptr,
    out_ptr,
    q_stride,
    k_stride,
    v_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Programs (token, block of heads): the query blocks first, then those of the keys and their values."""
    Q_BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    heads = tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF_PAD)[None, :]
    cos_R = tl.load(cos_ptr + token * HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
    sin_R = tl.load(sin_ptr + token * HALF + pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
    if block < Q_BLOCKS:
        heads += block * HEADS
        q_at = token * q_stride + heads * q_head_stride
        out_at = (token * H + heads) * D
        _rotate(
            q_ptr, out_ptr, cos_R, sin_R, heads < H, q_at, out_at, D, HALF, INTERLEAVED, HALF_PAD, REST_PAD, INTERPRET
        )
    else:
        row = tl.load(rows_ptr + token)
        heads += (block - Q_BLOCKS) * HEADS
        stored = heads < tl.where(row >= 0, G, 0)  # not `&`: with a scalar, the interpreter of Triton 3.9 fails there
        page_at = (row * G + heads) * D
        k_at = token * k_stride + heads * k_head_stride
        _rotate(
            k_ptr, k_pages_ptr, cos_R, sin_R, stored, k_at, page_at, D, HALF, INTERLEAVED, HALF_PAD, REST_PAD, INTERPRET
        )
        dims = tl.arange(0, D_PAD)[None, :]
        v_mask = stored & (dims < D)
        v = tl.load(v_ptr + token * v_stride + heads * v_head_stride + dims, mask=v_mask, other=0.0)
        tl.store(v_pages_ptr + page_at + dims, v, mask=v_mask)


def rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    rows_T: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """As the twin in reference_small.py -> rotated queries [T, H, D], contiguous.

    Queries, keys, values and pages have one dtype: float32, float16 or bfloat16. Heads may lie anywhere (slices of the
    stacked projections are fine) as long as each is contiguous; pages and tables are contiguous; tables have any of the
    three dtypes; rows are int64. Raises KernelError otherwise. Rows must be below P * S, which is not checked.
    """
    _check(q_THD, k_TGD, v_TGD, cos_T1R, sin_T1R, k_pages_PSGD, v_pages_PSGD, rows_T)
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads, half = k_TGD.shape[1], cos_T1R.shape[-1]
    padded_dim = triton.next_power_of_2(head_dim)
    heads = min(max(1, TILE_ELEMENTS // padded_dim), triton.next_power_of_2(max(num_heads, num_kv_heads)))
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens:
        _rope_write_kernel[(num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads))](
            q_THD,
            k_TGD,
            v_TGD,
            cos_T1R,
            sin_T1R,
            k_pages_PSGD,
            v_pages_PSGD,
            rows_T,
            out_THD,
            q_THD.stride(0),
            k_TGD.stride(0),
            v_TGD.stride(0),
            q_THD.stride(1),
            k_TGD.stride(1),
            v_TGD.stride(1),
            H=num_heads,
            G=num_kv_heads,
            D=head_dim,
            HALF=half,
            INTERLEAVED=interleaved,
            HEADS=heads,
            D_PAD=padded_dim,
            HALF_PAD=triton.next_power_of_2(half),
            REST_PAD=triton.next_power_of_2(max(1, head_dim - 2 * half)),
            INTERPRET=interpreting(),
            num_warps=4,
            # Each product is rounded, as in the twin.
            enable_fp_fusion=False,
        )
    return out_THD


def _check(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    rows_T: Tensor,
) -> None:
    check_tensor("q", q_THD, (None, None, None), FLOATS)
    num_tokens, _, head_dim = q_THD.shape
    check_tensor("k", k_TGD, (num_tokens, None, head_dim), (q_THD.dtype,))
    check_tensor("v", v_TGD, tuple(k_TGD.shape), (q_THD.dtype,))
    check_tensor("cos", cos_T1R, (num_tokens, 1, None), FLOATS)
    check_tensor("sin", sin_T1R, tuple(cos_T1R.shape), (cos_T1R.dtype,))
    rotated = 2 * cos_T1R.shape[-1]
    require(0 < rotated <= head_dim, f"cos and sin turn {rotated} of a head's {head_dim} dimensions")
    check_tensor("k_pages", k_pages_PSGD, (None, None, k_TGD.shape[1], head_dim), (q_THD.dtype,))
    check_tensor("v_pages", v_pages_PSGD, tuple(k_pages_PSGD.shape), (q_THD.dtype,))
    check_tensor("rows", rows_T, (num_tokens,), (torch.int64,))
    for name, tensor in (("q", q_THD), ("k", k_TGD), ("v", v_TGD)):
        require(tensor.stride(2) == 1, f"each head of {name} must be contiguous; its strides are {tensor.stride()}")
    whole = {"cos": cos_T1R, "sin": sin_T1R, "k_pages": k_pages_PSGD, "v_pages": v_pages_PSGD, "rows": rows_T}
    check_contiguous(**whole)
    check_one_device(q=q_THD, k=k_TGD, v=v_TGD, **whole)
