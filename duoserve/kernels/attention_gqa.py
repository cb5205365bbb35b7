"""Decode attention over the paged KV cache, split over the context, in Triton.

B sequences, H query heads, G KV heads, D head dimension, C context tokens, P pages, S tokens a page, M pages a sequence
may have, N chunks of a context.

The context is cut into chunks at fixed places, counted from its first token. One kernel attends to every chunk that
holds a visible token, another merges a sequence's chunks, always in the same order. Where the cuts lie depends on the
width of the page table alone, and not at all up to 32768 tokens: so far a sequence's bits are its own, and beyond, they
depend on the longest context of its batch. The number of programs never changes them. Lengths are read on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.limits import CHUNK_TOKENS, MAX_CHUNKS, MAX_HEAD_DIM
from duoserve.kernels.numerics import TRITON_DTYPES, interpreting, to_dtype

FLOATS = tuple(TRITON_DTYPES)
INDICES = (torch.int32, torch.int64)
# Programs beyond this many take several chunks each instead: 30 a multiprocessor of the largest GPUs.
MAX_PROGRAMS = 4096
# Query heads of a program: the 16 rows that the tensor cores take at least, and no more heads than most models have for
# one KV head. (64 rows spill at 128 dimensions on sm_100.)
HEAD_ROWS = 16
# A page's id is loaded one round before its rows, so this many stages keep two blocks of rows in flight.
NUM_STAGES = 5
# Bytes of a block, keys and values: two of them saturate memory from every multiprocessor (24 KiB of an H100's 3 TB/s
# at 1 us), and fit into the 100 KiB of shared memory of the smallest architecture.
BLOCK_BYTES = 16384
LOG2_E = tl.constexpr(math.log2(math.e))


class ChunkSplit(NamedTuple):
    """How one launch splits its work: ``num_chunks`` of ``chunk_tokens``, over ``num_programs`` for a KV head."""

    chunk_tokens: int
    num_chunks: int
    num_programs: int


def plan_chunks(table_tokens: int, num_rows: int) -> ChunkSplit:
    """The plan for a page table that spans ``table_tokens``, with ``num_rows`` (sequence, block of heads) pairs.

    Only ``num_programs``, which changes no bits, depends on the batch.
    """
    chunk_tokens = max(CHUNK_TOKENS, triton.next_power_of_2(triton.cdiv(table_tokens, MAX_CHUNKS)))
    num_chunks = triton.cdiv(table_tokens, chunk_tokens)
    return ChunkSplit(chunk_tokens, num_chunks, max(1, min(num_chunks, MAX_PROGRAMS // num_rows)))


def block_tokens(width: int, dtype: torch.dtype) -> int:
    """How many tokens of ``width`` elements fill BLOCK_BYTES: at least 16, which a dot needs, and at most 64.

    Float32 takes 16: its dots are unrolled into scalar products, and 32 spill on sm_90.
    """
    return 16 if dtype == torch.float32 else min(64, max(16, BLOCK_BYTES // (width * dtype.itemsize)))


@triton.jit
def visible_span(lengths_ptr, sequence, window, table_tokens):
    """The half-open range of tokens that the sequence's last token sees, cut off at the end of the table."""
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + sequence).to(tl.int32), 0), table_tokens)
    return tl.maximum(length - window, 0), length


@triton.jit
def attend_block(score_HC, visible_C, v_CD, max_H, sum_H, acc_HD, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """One block of online softmax: the maximum, the sum of exponentials and the unnormalized output with it.

    Scores are to base 2. This block or an earlier one must have a visible token, else the results are NaN.
    """
    score_HC = tl.where(visible_C[None, :], score_HC, float("-inf"))
    new_max_H = tl.maximum(max_H, tl.max(score_HC, axis=1))
    shrink_H = tl.exp2(max_H - new_max_H)
    p_HC = tl.exp2(score_HC - new_max_H[:, None])
    sum_H = sum_H * shrink_H + tl.sum(p_HC, axis=1)
    p_HC = to_dtype(p_HC, dtype, INTERPRET)
    if INTERPRET:
        p_HC = p_HC.to(tl.float32)
    acc_HD = tl.dot(p_HC, v_CD, acc_HD * shrink_H[:, None], input_precision="ieee")
    return new_max_H, sum_H, acc_HD


# No page table's width, nor number of chunks, is worth a compilation in the midst of a request.
@triton.jit(do_not_specialize=["table_stride", "num_chunks"])
def _chunks_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lengths_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    scale_log2,
    window,
    q_stride,
    q_head_stride,
    table_stride,
    table_tokens,
    num_chunks,
    chunk_tokens,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    D_PAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A program (sequence, block of a KV head's query heads, first chunk) writes its chunks' unnormalized sums."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    in_group_H = tl.program_id(1) % HEAD_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    heads_H = kv_head * GROUP + in_group_H
    dims_D = tl.arange(0, D_PAD)
    q_mask = (in_group_H < GROUP)[:, None] & (dims_D < D)[None, :]
    q_at = sequence * q_stride + heads_H[:, None] * q_head_stride + dims_D[None, :]
    q_HD = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)
    if INTERPRET:
        q_HD = q_HD.to(tl.float32)
    first, length = visible_span(lengths_ptr, sequence, window, table_tokens)

    for chunk in range(first // chunk_tokens + tl.program_id(2), tl.cdiv(length, chunk_tokens), tl.num_programs(2)):
        # From a block's edge on, so that every block has a visible token and the maximum is a number.
        start = tl.maximum(chunk * chunk_tokens, first) // BLOCK_C * BLOCK_C
        stop = tl.minimum((chunk + 1) * chunk_tokens, length)
        max_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        sum_H = tl.zeros((BLOCK_H,), tl.float32)
        acc_HD = tl.zeros((BLOCK_H, D_PAD), tl.float32)
        for at in tl.range(start, stop, BLOCK_C):
            tokens_C = at + tl.arange(0, BLOCK_C)
            visible_C = (tokens_C >= first) & (tokens_C < stop)
            pages_C = tl.load(table_ptr + sequence * table_stride + tokens_C // PAGE, mask=visible_C, other=0)
            rows_C = (pages_C.to(tl.int64) * PAGE + tokens_C % PAGE) * G + kv_head
            kv_at = rows_C[:, None] * D + dims_D[None, :]
            kv_mask = visible_C[:, None] & (dims_D < D)[None, :]
            k_CD = tl.load(k_ptr + kv_at, mask=kv_mask, other=0.0)
            v_CD = tl.load(v_ptr + kv_at, mask=kv_mask, other=0.0)
            if INTERPRET:
                k_CD, v_CD = k_CD.to(tl.float32), v_CD.to(tl.float32)
            score_HC = tl.dot(q_HD, tl.trans(k_CD), input_precision="ieee") * scale_log2
            max_H, sum_H, acc_HD = attend_block(score_HC, visible_C, v_CD, max_H, sum_H, acc_HD, dtype, INTERPRET)
        part_H = (sequence * (G * GROUP) + heads_H) * num_chunks + chunk
        tl.store(max_ptr + part_H, max_H, mask=in_group_H < GROUP)
        tl.store(sum_ptr + part_H, sum_H, mask=in_group_H < GROUP)
        tl.store(acc_ptr + part_H[:, None] * D + dims_D[None, :], acc_HD, mask=q_mask)


@triton.jit(do_not_specialize=["num_chunks"])
def _merge_kernel(
    acc_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    lengths_ptr,
    out_ptr,
    window,
    table_tokens,
    num_chunks,
    chunk_tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D_PAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A program (sequence, head) adds its chunks' sums on one scale, and divides by the sum of all exponentials."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first, length = visible_span(lengths_ptr, sequence, window, table_tokens)
    first_chunk, stop_chunk = first // chunk_tokens, tl.cdiv(length, chunk_tokens)
    part = (sequence * H + head) * num_chunks
    chunks_N = first_chunk + tl.arange(0, MAX_CHUNKS)
    max_N = tl.load(max_ptr + part + chunks_N, mask=chunks_N < stop_chunk, other=float("-inf"))
    sum_N = tl.load(sum_ptr + part + chunks_N, mask=chunks_N < stop_chunk, other=0.0)
    top = tl.max(max_N)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    top = tl.where(length > 0, top, 0.0)
    total = tl.sum(sum_N * tl.exp2(max_N - top))
    if HAS_SINKS:
        total += tl.exp2(sink - top)

    dims_D = tl.arange(0, D_PAD)
    out_D = tl.zeros((D_PAD,), tl.float32)
    for at in tl.range(first_chunk, stop_chunk, BLOCK_N, num_stages=3):
        block_N = at + tl.arange(0, BLOCK_N)
        inside = block_N < stop_chunk
        factor_N = tl.exp2(tl.load(max_ptr + part + block_N, mask=inside, other=float("-inf")) - top)
        acc_at = (part + block_N)[:, None] * D + dims_D[None, :]
        acc_ND = tl.load(acc_ptr + acc_at, mask=inside[:, None] & (dims_D < D)[None, :], other=0.0)
        out_D += tl.sum(acc_ND * factor_N[:, None], axis=0)
    out_D = tl.where(length > 0, out_D / tl.where(length > 0, total, 1.0), 0.0)
    out_at = (sequence * H + head) * D + dims_D
    tl.store(out_ptr + out_at, to_dtype(out_D, out_ptr.dtype.element_ty, INTERPRET), mask=dims_D < D)


class Partials(NamedTuple):
    """Each chunk's result before the merge, float32: unnormalized output, maximum and sum of exponentials (base 2)."""

    acc_BHND: Tensor
    max_BHN: Tensor
    sum_BHN: Tensor


def new_partials(like_BHD: Tensor, num_chunks: int) -> Partials:
    """Makes uninitialized partials: the merge reads only what the chunks have written."""
    batch, heads, dim = like_BHD.shape
    shape = (batch, heads, num_chunks)
    acc_BHND = torch.empty((*shape, dim), dtype=torch.float32, device=like_BHD.device)
    return Partials(acc_BHND, *(torch.empty(shape, dtype=torch.float32, device=like_BHD.device) for _ in range(2)))


def merge_chunks(
    partials: Partials,
    sinks_H: Tensor | None,
    lengths_B: Tensor,
    window: int,
    table_tokens: int,
    plan: ChunkSplit,
    dtype: torch.dtype,
) -> Tensor:
    """The attention output [B, H, D] of all chunks' partial results."""
    batch, num_heads, _, dim = partials.acc_BHND.shape
    out_BHD = torch.empty((batch, num_heads, dim), dtype=dtype, device=lengths_B.device)
    padded_dim = triton.next_power_of_2(dim)
    _merge_kernel[(batch, num_heads)](
        partials.acc_BHND,
        partials.max_BHN,
        partials.sum_BHN,
        lengths_B if sinks_H is None else sinks_H,
        lengths_B,
        out_BHD,
        window,
        table_tokens,
        plan.num_chunks,
        plan.chunk_tokens,
        H=num_heads,
        D=dim,
        HAS_SINKS=sinks_H is not None,
        MAX_CHUNKS=MAX_CHUNKS,
        BLOCK_N=max(1, 2048 // padded_dim),
        D_PAD=padded_dim,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out_BHD


def decode_attention(
    q_BHD: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Does as its twin in reference_attention.py; the result is [B, H, D], contiguous.

    Queries and pages have one dtype: float32, float16 or bfloat16; H is a multiple of G; D is at most MAX_HEAD_DIM;
    pages are contiguous; table and lengths are int32 or int64; sinks have any float dtype. Page ids up to each length
    must be below P, which only the device could check: the caller promises it. What lies beyond a length is not read,
    in the table or in the pages, and a length beyond the table counts as the table's. Raises KernelError for operands
    that do not fit.
    """
    _check(q_BHD, k_pages_PSGD, v_pages_PSGD, page_table_BM, lengths_B, window, sinks_H)
    batch, num_heads, dim = q_BHD.shape
    num_kv_heads, page_tokens = k_pages_PSGD.shape[2], k_pages_PSGD.shape[1]
    group = num_heads // num_kv_heads
    padded_dim = max(16, triton.next_power_of_2(dim))
    table_tokens = page_table_BM.shape[1] * page_tokens
    head_blocks = num_kv_heads * triton.cdiv(group, HEAD_ROWS)
    plan = plan_chunks(table_tokens, max(1, batch * head_blocks))
    span = table_tokens if window is None else min(window, table_tokens)
    partials = new_partials(q_BHD, plan.num_chunks)
    if batch == 0:
        return torch.empty_like(q_BHD)
    _chunks_kernel[(batch, head_blocks, plan.num_programs)](
        q_BHD,
        k_pages_PSGD,
        v_pages_PSGD,
        page_table_BM,
        lengths_B,
        *partials,
        scale * LOG2_E.value,
        span,
        q_BHD.stride(0),
        q_BHD.stride(1),
        page_table_BM.stride(0),
        table_tokens,
        plan.num_chunks,
        plan.chunk_tokens,
        G=num_kv_heads,
        GROUP=group,
        D=dim,
        PAGE=page_tokens,
        BLOCK_H=HEAD_ROWS,
        BLOCK_C=block_tokens(2 * padded_dim, q_BHD.dtype),
        D_PAD=padded_dim,
        INTERPRET=interpreting(),
        num_warps=4,
        num_stages=NUM_STAGES,
    )
    return merge_chunks(partials, sinks_H, lengths_B, span, table_tokens, plan, q_BHD.dtype)


def check_table(batch: int, page_table_BM: Tensor, lengths_B: Tensor) -> None:
    """Raises KernelError unless the table and the lengths can serve ``batch`` sequences."""
    check_tensor("page_table", page_table_BM, (batch, None), INDICES)
    check_tensor("lengths", lengths_B, (batch,), INDICES)
    require(page_table_BM.shape[1] > 0, "page_table has no columns")
    require(page_table_BM.stride(1) == 1, f"page_table[b] must be contiguous; its strides are {page_table_BM.stride()}")
    check_contiguous(lengths=lengths_B)


def _check(
    q_BHD: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    window: int | None,
    sinks_H: Tensor | None,
) -> None:
    check_tensor("q", q_BHD, (None, None, None), FLOATS)
    batch, num_heads, dim = q_BHD.shape
    require(1 <= dim <= MAX_HEAD_DIM, f"a head has {dim} dimensions; supported: 1 to {MAX_HEAD_DIM}")
    require(q_BHD.stride(2) == 1, f"each head of q must be contiguous; its strides are {q_BHD.stride()}")
    check_tensor("k_pages", k_pages_PSGD, (None, None, None, dim), (q_BHD.dtype,))
    check_tensor("v_pages", v_pages_PSGD, tuple(k_pages_PSGD.shape), (q_BHD.dtype,))
    num_kv_heads = k_pages_PSGD.shape[2]
    shared = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    require(shared, f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    check_table(batch, page_table_BM, lengths_B)
    require(window is None or window >= 1, f"window is {window}; it must be at least 1, the token itself")
    operands = {"q": q_BHD, "k_pages": k_pages_PSGD, "v_pages": v_pages_PSGD, "page_table": page_table_BM}
    operands["lengths"] = lengths_B
    if sinks_H is not None:
        check_tensor("sinks", sinks_H, (num_heads,), FLOATS)
        check_contiguous(sinks=sinks_H)
        operands["sinks"] = sinks_H
    check_contiguous(k_pages=k_pages_PSGD, v_pages=v_pages_PSGD)
    check_one_device(**operands)
