"""The experts of one token: matrix-vector products at the pace of memory, with the combine in registers.

K top-k, S slots, H hidden, I expert intermediate. In a kernel a CTA has BN weight rows and reads BK of each at a time.
Every lane sums in float32 in a fixed order, so the bits depend only on the shapes; they differ from those of the GEMMs
and the combine, which round in between. No model computes with these: GEMMs compute the experts that are read through,
and bits must not depend on where an expert was.

They take one token, and weights in floats: decoding quantized ones is too slow without tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.configs import GemvConfig, gemv_config
from duoserve.kernels.machine import machine
from duoserve.kernels.moe_checks import check_rows, check_weights
from duoserve.kernels.numerics import interpreting, to_dtype
from duoserve.kernels.weights import ExpertFormat, ExpertWeights


@triton.jit
def moe_gemv_up_kernel(
    x,
    w,
    slots_K,
    act,
    num_slots,
    slot_stride,
    N,
    D,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BN interleaved gate and up rows of one expert: ``silu(gate) * up``."""
    j = tl.program_id(1)
    slot = tl.load(slots_K + j)
    there = (slot >= 0) & (slot < num_slots)
    slot = tl.where(there, slot, 0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w_at = w + slot.to(tl.int64) * slot_stride + tl.minimum(n, N - 1)[:, None] * D + k[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    for first in tl.range(0, D, BK, num_stages=STAGES):
        inside = k < D - first
        x_k = tl.load(x + first + k) if EVEN else tl.load(x + first + k, mask=inside, other=0.0)
        w_nk = tl.load(w_at + first) if EVEN else tl.load(w_at + first, mask=inside[None, :], other=0.0)
        acc += w_nk.to(tl.float32) * x_k.to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(tl.sum(acc, axis=1), (BN // 2, 2)))
    result = tl.where(there, gate / (1.0 + tl.exp(-gate)) * up, float("nan"))
    i = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    at = act + j.to(tl.int64) * (N // 2) + i
    tl.store(at, to_dtype(result, act.dtype.element_ty, INTERPRET), mask=i < N // 2)


@triton.jit
def moe_gemv_down_kernel(
    act,
    w,
    slots_K,
    topk_weights,
    shared,
    out,
    num_slots,
    slot_stride,
    N,
    D,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BN rows of all K experts, one expert after another in one loop, so that loads never pause between them."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row_at = tl.minimum(n, N - 1)[:, None] * D + k[None, :]
    chunks = tl.cdiv(D, BK)
    acc = tl.zeros((BN, BK), tl.float32)
    for step in tl.range(0, K * chunks, num_stages=STAGES):
        j = step // chunks
        first = (step - j * chunks) * BK
        slot = tl.load(slots_K + j)
        there = (slot >= 0) & (slot < num_slots)
        w_at = w + tl.where(there, slot, 0).to(tl.int64) * slot_stride + row_at + first
        inside = k < D - first
        a_at = act + j * D + first + k
        a_k = tl.load(a_at) if EVEN else tl.load(a_at, mask=inside, other=0.0)
        w_nk = tl.load(w_at) if EVEN else tl.load(w_at, mask=inside[None, :], other=0.0)
        weight = tl.where(there, tl.load(topk_weights + j), float("nan"))
        acc += w_nk.to(tl.float32) * (a_k.to(tl.float32) * weight)[None, :]
    result = tl.sum(acc, axis=1)
    if HAS_SHARED:
        result += tl.load(shared + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, to_dtype(result, out.dtype.element_ty, INTERPRET), mask=n < N)


def moe_gemv_up(
    x_1H: Tensor, weights: ExpertWeights, slots_K: Tensor, act_KI: Tensor, config: GemvConfig | None = None
) -> None:
    """``silu(x w1^T) * (x w3^T)`` of the K experts in ``slots_K`` (int32, on the device) into the rows of ``act_KI``.

    A slot that does not exist gives NaN. All tensors have one dtype: float32, float16 or bfloat16. Raises KernelError
    for operands that do not fit.
    """
    hidden, inter = _check_float(weights)
    check_slots(slots_K, weights.w13_SNH)
    check_rows("x_1H", x_1H, (1, hidden), weights)
    check_rows("act_KI", act_KI, (len(slots_K), inter), weights)
    w = weights.w13_SNH
    if not inter or not len(slots_K):
        return
    config = config or gemv_config(w.dtype, machine(w.device)[0], hidden)
    moe_gemv_up_kernel[(triton.cdiv(2 * inter, config.block_n), len(slots_K))](
        x_1H,
        w,
        slots_K,
        act_KI,
        w.shape[0],
        w.stride(0),
        2 * inter,
        hidden,
        BN=config.block_n,
        BK=config.block_k,
        EVEN=hidden % config.block_k == 0,
        STAGES=config.num_stages,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )


def moe_gemv_down(
    act_KI: Tensor,
    weights: ExpertWeights,
    slots_K: Tensor,
    topk_weights_1K: Tensor,
    shared_1H: Tensor | None,
    out_1H: Tensor,
    config: GemvConfig | None = None,
) -> None:
    """``out = sum_j weight_j * act_j w2_j^T + shared`` with float32 ``topk_weights_1K``, rounded once.

    Slots, dtypes and errors as in ``moe_gemv_up``.
    """
    hidden, inter = _check_float(weights)
    w = weights.w2_SHI
    check_slots(slots_K, w)
    check_rows("act_KI", act_KI, (len(slots_K), inter), weights)
    check_rows("out_1H", out_1H, (1, hidden), weights)
    check_tensor("topk_weights_1K", topk_weights_1K, (1, len(slots_K)), (torch.float32,))
    check_contiguous(topk_weights_1K=topk_weights_1K)
    check_one_device(topk_weights_1K=topk_weights_1K, weights=w)
    if shared_1H is not None:
        check_rows("shared_1H", shared_1H, (1, hidden), weights)
    config = config or gemv_config(w.dtype, machine(w.device)[0], inter)
    moe_gemv_down_kernel[(triton.cdiv(hidden, config.block_n),)](
        act_KI,
        w,
        slots_K,
        topk_weights_1K,
        out_1H if shared_1H is None else shared_1H,
        out_1H,
        w.shape[0],
        w.stride(0),
        hidden,
        inter,
        K=len(slots_K),
        BN=config.block_n,
        BK=config.block_k,
        EVEN=inter % config.block_k == 0,
        HAS_SHARED=shared_1H is not None,
        STAGES=config.num_stages,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )


def _check_float(weights: ExpertWeights) -> tuple[int, int]:
    """Refuses quantized weights, which go through the GEMMs: decoding without tensor cores is slower than memory."""
    is_float = weights.format is ExpertFormat.FLOAT
    require(is_float, f"one token's {weights.format.value} experts are computed by moe_up and moe_down")
    return check_weights(weights)


def check_slots(slots_K: Tensor, w: Tensor) -> None:
    """Checks that there is one slot for each of K experts, on the device of the weights ``w``."""
    check_tensor("slots_K", slots_K, (None,), (torch.int32,))
    check_contiguous(slots_K=slots_K)
    check_one_device(slots_K=slots_K, weights=w)
    require(len(w) > 0, "there are no slots")
