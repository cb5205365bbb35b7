"""Multi-head latent attention of one new token over the paged cache of latents, in absorbed form, in Triton.

B sequences, H query heads, L latent dimensions, R rotary dimensions, W = L + R, P pages, S tokens a page, M pages a
sequence may have. One row of the cache is the key of every head and, in its first L elements, the value too: it is read
once. Chunks, their merge and what follows for a sequence's bits are those of attention_gqa.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.attention_gqa import (
    FLOATS,
    LOG2_E,
    attend_block,
    check_table,
    merge_chunks,
    new_partials,
    plan_chunks,
    visible_span,
)
from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.limits import MAX_LATENT_DIM, MAX_ROTATED_DIM
from duoserve.kernels.numerics import interpreting

# Query heads of a program, the least that the tensor cores take. 32 would read a page half as often where there are 128
# heads, but leave room for one program on a multiprocessor and for none on sm_86 and sm_89; 64 spill.
HEAD_ROWS = 16
# 16 x 512 accumulators and as many queries are 64 registers a thread of 8 warps; 4 warps need all 255.
NUM_WARPS = 8


# As in ``attention_gqa``, neither is worth a compilation in the midst of a request.
@triton.jit(do_not_specialize=["table_stride", "num_chunks"])
def _mla_chunks_kernel(
    q_latent_ptr,
    q_rope_ptr,
    pages_ptr,
    table_ptr,
    lengths_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    scale_log2,
    latent_stride,
    latent_head_stride,
    rope_stride,
    rope_head_stride,
    table_stride,
    table_tokens,
    num_chunks,
    chunk_tokens,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    L_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A program (sequence, block of heads, first chunk) writes its chunks' unnormalized sums."""
    dtype: tl.constexpr = q_latent_ptr.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    heads_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    latent_L, rope_R = tl.arange(0, L_PAD), tl.arange(0, R_PAD)
    latent_mask = (heads_H < H)[:, None] & (latent_L < L)[None, :]
    rope_mask = (heads_H < H)[:, None] & (rope_R < R)[None, :]
    latent_at = sequence * latent_stride + heads_H[:, None] * latent_head_stride + latent_L[None, :]
    rope_at = sequence * rope_stride + heads_H[:, None] * rope_head_stride + rope_R[None, :]
    q_latent_HL = tl.load(q_latent_ptr + latent_at, mask=latent_mask, other=0.0)
    q_rope_HR = tl.load(q_rope_ptr + rope_at, mask=rope_mask, other=0.0)
    if INTERPRET:
        q_latent_HL, q_rope_HR = q_latent_HL.to(tl.float32), q_rope_HR.to(tl.float32)
    _, length = visible_span(lengths_ptr, sequence, table_tokens, table_tokens)

    for chunk in range(tl.program_id(2), tl.cdiv(length, chunk_tokens), tl.num_programs(2)):
        stop = tl.minimum((chunk + 1) * chunk_tokens, length)
        max_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        sum_H = tl.zeros((BLOCK_H,), tl.float32)
        acc_HL = tl.zeros((BLOCK_H, L_PAD), tl.float32)
        for at in tl.range(chunk * chunk_tokens, stop, BLOCK_C):
            tokens_C = at + tl.arange(0, BLOCK_C)
            visible_C = tokens_C < stop
            pages_C = tl.load(table_ptr + sequence * table_stride + tokens_C // PAGE, mask=visible_C, other=0)
            rows_C = (pages_C.to(tl.int64) * PAGE + tokens_C % PAGE) * (L + R)
            latent_CL = tl.load(
                pages_ptr + rows_C[:, None] + latent_L[None, :],
                mask=visible_C[:, None] & (latent_L < L)[None, :],
                other=0.0,
            )
            rope_CR = tl.load(
                pages_ptr + rows_C[:, None] + L + rope_R[None, :],
                mask=visible_C[:, None] & (rope_R < R)[None, :],
                other=0.0,
            )
            if INTERPRET:
                latent_CL, rope_CR = latent_CL.to(tl.float32), rope_CR.to(tl.float32)
            score_HC = tl.dot(q_latent_HL, tl.trans(latent_CL), input_precision="ieee")
            score_HC = tl.dot(q_rope_HR, tl.trans(rope_CR), score_HC, input_precision="ieee") * scale_log2
            max_H, sum_H, acc_HL = attend_block(score_HC, visible_C, latent_CL, max_H, sum_H, acc_HL, dtype, INTERPRET)
        part_H = (sequence * H + heads_H) * num_chunks + chunk
        tl.store(max_ptr + part_H, max_H, mask=heads_H < H)
        tl.store(sum_ptr + part_H, sum_H, mask=heads_H < H)
        tl.store(acc_ptr + part_H[:, None] * L + latent_L[None, :], acc_HL, mask=latent_mask)


def mla_decode_attention(
    q_latent_BHL: Tensor,
    q_rope_BHR: Tensor,
    latent_pages_PSW: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
) -> Tensor:
    """Does as its twin in reference_attention.py; the result is [B, H, L], contiguous.

    Queries and pages have one dtype: float32, float16 or bfloat16; L is at most MAX_LATENT_DIM and R at most
    MAX_ROTATED_DIM; pages are contiguous. Table and lengths are as in ``decode_attention``. Raises KernelError for
    operands that do not fit.
    """
    _check(q_latent_BHL, q_rope_BHR, latent_pages_PSW, page_table_BM, lengths_B)
    batch, num_heads, latent_dim = q_latent_BHL.shape
    if batch == 0:
        return torch.empty_like(q_latent_BHL)
    rope_dim, page_tokens = q_rope_BHR.shape[2], latent_pages_PSW.shape[1]
    padded_latent, padded_rope = (max(16, triton.next_power_of_2(dim)) for dim in (latent_dim, rope_dim))
    table_tokens = page_table_BM.shape[1] * page_tokens
    # Blocks of 36 KiB at 512 + 64 dimensions. The ids of their pages are loaded one round before, so 5 stages keep two
    # of them in flight and 3 one: 92 and 73 KiB of shared memory, of the 99 that the smallest architecture has.
    wide = q_latent_BHL.dtype == torch.float32
    head_blocks = triton.cdiv(num_heads, HEAD_ROWS)
    plan = plan_chunks(table_tokens, batch * head_blocks)
    partials = new_partials(q_latent_BHL, plan.num_chunks)
    _mla_chunks_kernel[(batch, head_blocks, plan.num_programs)](
        q_latent_BHL,
        q_rope_BHR,
        latent_pages_PSW,
        page_table_BM,
        lengths_B,
        *partials,
        scale * LOG2_E.value,
        *q_latent_BHL.stride()[:2],
        *q_rope_BHR.stride()[:2],
        page_table_BM.stride(0),
        table_tokens,
        plan.num_chunks,
        plan.chunk_tokens,
        H=num_heads,
        L=latent_dim,
        R=rope_dim,
        PAGE=page_tokens,
        BLOCK_H=HEAD_ROWS,
        BLOCK_C=16 if wide else 32,
        L_PAD=padded_latent,
        R_PAD=padded_rope,
        INTERPRET=interpreting(),
        num_warps=NUM_WARPS,
        num_stages=3 if wide else 5,
    )
    return merge_chunks(partials, None, lengths_B, table_tokens, table_tokens, plan, q_latent_BHL.dtype)


def _check(
    q_latent_BHL: Tensor, q_rope_BHR: Tensor, latent_pages_PSW: Tensor, page_table_BM: Tensor, lengths_B: Tensor
) -> None:
    check_tensor("q_latent", q_latent_BHL, (None, None, None), FLOATS)
    batch, num_heads, latent_dim = q_latent_BHL.shape
    check_tensor("q_rope", q_rope_BHR, (batch, num_heads, None), (q_latent_BHL.dtype,))
    rope_dim = q_rope_BHR.shape[2]
    fits = 1 <= latent_dim <= MAX_LATENT_DIM and 1 <= rope_dim <= MAX_ROTATED_DIM
    supported = f"1 to {MAX_LATENT_DIM} and 1 to {MAX_ROTATED_DIM}"
    require(fits, f"{latent_dim} latent and {rope_dim} rotary dimensions; supported: {supported}")
    check_tensor("latent_pages", latent_pages_PSW, (None, None, latent_dim + rope_dim), (q_latent_BHL.dtype,))
    for name, q in (("q_latent", q_latent_BHL), ("q_rope", q_rope_BHR)):
        require(q.stride(2) == 1, f"each head of {name} must be contiguous; its strides are {q.stride()}")
    check_table(batch, page_table_BM, lengths_B)
    check_contiguous(latent_pages=latent_pages_PSW)
    check_one_device(
        q_latent=q_latent_BHL,
        q_rope=q_rope_BHR,
        latent_pages=latent_pages_PSW,
        page_table=page_table_BM,
        lengths=lengths_B,
    )
