"""The grouped GEMMs of the experts: weights read from the slots where they lie, rows gathered and scattered in place.

T tokens, K top-k, S slots, H hidden, I expert intermediate, R = T * K routed rows. In a kernel N is the weight's rows
(2I or H) and D its inner dimension (H or I); a tile is BN weight rows by BT routed rows by BK of D. The weights are
the left operand of the product, so that the side which tensor cores want wide is the weights, however few rows come.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.configs import INTERPRETER, GemmConfig, gemm_config, shape_class
from duoserve.kernels.numerics import interpreting, to_dtype
from duoserve.kernels.routing import RoutePlan, Work
from duoserve.kernels.weights import ExpertWeights

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED_CTAS = 3  # enough to show a mistake in the persistent loop


@triton.jit
def _item_tiles(experts_W, starts_E1, count, items, num_n, BT: tl.constexpr):
    """How many tiles each entry of the work list has."""
    experts = tl.load(experts_W + items, mask=items < count, other=0)
    rows = tl.load(starts_E1 + experts + 1) - tl.load(starts_E1 + experts)
    return tl.where(items < count, tl.cdiv(rows, BT) * num_n, 0)


@triton.jit
def _place_in_expert(tile, num_t, num_n, GROUP_T: tl.constexpr):
    """(t, n) of an expert's ``tile``: down bands of GROUP_T tiles of rows, t the fastest."""
    band = tile // (GROUP_T * num_n)
    first_t = band * GROUP_T
    band_t = tl.minimum(num_t - first_t, GROUP_T)
    in_band = tile - band * GROUP_T * num_n
    return first_t + in_band % band_t, in_band // band_t


@triton.jit
def _product(
    x,
    x_rows,
    w,
    slot,
    slot_stride,
    first_n,
    N,
    D,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``W x^T`` in float32 [BN, BT] for BN weight rows from ``first_n`` on and the rows of x at ``x_rows``.

    Weight rows past N and unused x rows are some row that exists: their results are never stored.
    """
    k = tl.arange(0, BK)
    x_at = x + x_rows.to(tl.int64)[None, :] * D + k[:, None]
    if not TMA:
        n = tl.minimum(first_n + tl.arange(0, BN), N - 1)
        w_at = w + slot.to(tl.int64) * slot_stride + n[:, None] * D + k[None, :]
    acc = tl.zeros((BN, BT), tl.float32)
    for first_k in range(0, D, BK):
        left = D - first_k
        x_tile = tl.load(x_at) if EVEN else tl.load(x_at, mask=k[:, None] < left, other=0.0)
        if TMA:
            w_tile = w.load([slot, first_n, first_k]).reshape(BN, BK)
        else:
            w_tile = tl.load(w_at) if EVEN else tl.load(w_at, mask=k[None, :] < left, other=0.0)
            w_at += BK
        x_at += BK
        if INTERPRET:  # which multiplies only float32 rightly
            acc = tl.dot(w_tile.to(tl.float32), x_tile.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(w_tile, x_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _silu_up(acc, BN: tl.constexpr, BT: tl.constexpr):
    """``silu(gate) * up`` [BN / 2, BT] of interleaved gate and up rows."""
    pairs = tl.permute(tl.reshape(acc, (BN // 2, 2, BT)), (0, 2, 1))
    gate, up = tl.split(pairs)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def moe_gemm_kernel(
    x,
    w,
    order_R,
    starts_E1,
    experts_W,
    slots_W,
    count_1,
    out,
    num_slots,
    slot_stride,
    N,
    D,
    num_rows,
    TOP_K: tl.constexpr,
    UP: tl.constexpr,
    WP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``moe_up`` (UP) or ``moe_down``: each CTA takes every so-many-th tile of all experts in the work list."""
    items = tl.arange(0, WP)
    num_n = tl.cdiv(N, BN)
    tiles = _item_tiles(experts_W, starts_E1, tl.load(count_1), items, num_n, BT)
    ends = tl.cumsum(tiles, axis=0)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0)):
        item = tl.sum((ends <= tile).to(tl.int32), axis=0)
        before = tl.sum(tl.where(items == item, ends - tiles, 0), axis=0)
        expert = tl.load(experts_W + item)
        slot = tl.load(slots_W + item)
        there = (slot >= 0) & (slot < num_slots)
        slot = tl.where(there, slot, 0)
        first = tl.load(starts_E1 + expert)
        last = tl.load(starts_E1 + expert + 1)
        t, n = _place_in_expert(tile - before, tl.cdiv(last - first, BT), num_n, GROUP_T)
        rows = first + t * BT + tl.arange(0, BT)
        used = rows < last
        order = tl.load(order_R + rows, mask=used, other=0)
        x_rows = order // TOP_K if UP else tl.minimum(rows, num_rows - 1)
        acc = _product(x, x_rows, w, slot, slot_stride, n * BN, N, D, BN, BT, BK, TMA, EVEN, INTERPRET)
        acc = tl.where(there, acc, float("nan"))  # an expert in no slot must be heard of
        if UP:
            result = _silu_up(acc, BN, BT)
            columns = n * (BN // 2) + tl.arange(0, BN // 2)
            width = N // 2
            out_rows = rows
        else:
            result = acc
            columns = n * BN + tl.arange(0, BN)
            width = N
            out_rows = order
        at = out + out_rows.to(tl.int64)[None, :] * width + columns[:, None]
        mask = used[None, :] & (columns < width)[:, None]
        tl.store(at, to_dtype(result, out.dtype.element_ty, INTERPRET), mask=mask)


def moe_up(
    x_TH: Tensor, weights: ExpertWeights, plan: RoutePlan, work: Work, act_RI: Tensor, config: GemmConfig | None = None
) -> None:
    """``silu(x w1^T) * (x w3^T)`` for the rows of each expert in ``work``, into their sorted rows of ``act_RI``.

    Other rows of ``act_RI`` are not touched; an expert without a slot gives NaN. float32, float16 or bfloat16, all
    operands alike; sums in float32. ``config`` is the table's unless given. KernelError for operands that do not fit.
    """
    hidden, inter = check_operands(weights, plan, work)
    check_rows("x_TH", x_TH, (len(plan.order_N) // plan.top_k, hidden), weights.w13_SNH)
    check_rows("act_RI", act_RI, (len(plan.order_N), inter), weights.w13_SNH)
    _launch(x_TH, weights.w13_SNH, plan, work, act_RI, config, up=True)


def moe_down(
    act_RI: Tensor, weights: ExpertWeights, plan: RoutePlan, work: Work, y_RH: Tensor, config: GemmConfig | None = None
) -> None:
    """Writes ``act w2^T`` of each expert in ``work``, unweighted, to its rows' places ``token * K + j`` in ``y_RH``.

    Other rows of ``y_RH`` are not touched. Dtypes, ``config`` and errors as in ``moe_up``.
    """
    hidden, inter = check_operands(weights, plan, work)
    check_rows("act_RI", act_RI, (len(plan.order_N), inter), weights.w2_SHI)
    check_rows("y_RH", y_RH, (len(plan.order_N), hidden), weights.w2_SHI)
    _launch(act_RI, weights.w2_SHI, plan, work, y_RH, config, up=False)


def check_operands(weights: ExpertWeights, plan: RoutePlan, work: Work) -> tuple[int, int]:
    """Weights, plan and work fit each other; returns H and I."""
    for name, tensor in (("order_N", plan.order_N), ("starts_E1", plan.starts_E1), ("experts_W", work.experts_W)):
        check_tensor(name, tensor, (None,), (torch.int32,))
    check_tensor("slots_W", work.slots_W, tuple(work.experts_W.shape), (torch.int32,))
    check_tensor("count_1", work.count_1, (1,), (torch.int32,))
    check_contiguous(order_N=plan.order_N, starts_E1=plan.starts_E1, experts_W=work.experts_W, slots_W=work.slots_W)
    check_one_device(
        weights=weights.w13_SNH, order_N=plan.order_N, starts_E1=plan.starts_E1, slots_W=work.slots_W, count=work.count_1
    )
    return check_weights(weights)


def check_weights(weights: ExpertWeights) -> tuple[int, int]:
    """Both matrices fit each other and the kernels; returns H and I."""
    w13, w2 = weights.w13_SNH, weights.w2_SHI
    check_tensor("w13_SNH", w13, (None, None, None), FLOATS)
    num_slots, two_inter, hidden = w13.shape
    check_tensor("w2_SHI", w2, (num_slots, hidden, two_inter // 2), (w13.dtype,))
    for name, w in (("w13_SNH", w13), ("w2_SHI", w2)):
        require(w.stride()[1:] == (w.shape[2], 1), f"the rows of {name} must lie one after another in a slot")
        require(w.shape[1] * w.shape[2] < 2**31, f"an expert's {name} has 2^31 elements or more")
    check_one_device(w13_SNH=w13, w2_SHI=w2)
    require(two_inter % 2 == 0, f"w13_SNH has {two_inter} rows; gate and up rows come in pairs")
    return hidden, two_inter // 2


def check_rows(name: str, rows: Tensor, shape: tuple[int, int], w: Tensor) -> None:
    """A matrix of activations that goes with the weights ``w``."""
    check_tensor(name, rows, shape, (w.dtype,))
    check_contiguous(**{name: rows})
    check_one_device(**{name: rows, "weights": w})


def tma_fits(w: Tensor) -> bool:
    """Whether a tensor descriptor can read ``w``: its address and strides are multiples of 16 bytes."""
    strides = (w.stride(0), w.stride(1))
    return w.data_ptr() % 16 == 0 and all(stride * w.element_size() % 16 == 0 for stride in strides)


@cache
def machine(device: torch.device) -> tuple[int, int]:
    """(architecture as in ``gemm_config``, number of SMs) of ``device``."""
    if device.type != "cuda":
        require(interpreting(), f"Triton kernels need a GPU, not {device}, or TRITON_INTERPRET=1")
        return INTERPRETER, INTERPRETED_CTAS
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _launch(
    x: Tensor, w: Tensor, plan: RoutePlan, work: Work, out: Tensor, config: GemmConfig | None, *, up: bool
) -> None:
    num_slots, N, D = w.shape
    num_rows, max_items = len(plan.order_N), len(work.experts_W)
    num_experts = len(plan.starts_E1) - 1
    if num_rows == 0 or max_items == 0 or num_slots == 0:
        return
    arch, num_sms = machine(w.device)
    if config is None:
        block_t = shape_class(num_rows // plan.top_k, plan.top_k, num_experts)
        config = gemm_config(w.dtype, arch, block_t, tma_fits(w))
    most_tiles = triton.cdiv(N, config.block_n) * (num_rows // config.block_t + min(max_items, num_rows))
    weights: Any = w
    if config.tma:
        require(tma_fits(w), "a tensor descriptor needs addresses and strides in multiples of 16 bytes")
        weights = TensorDescriptor(w, list(w.shape), list(w.stride()), [1, config.block_n, config.block_k])
    moe_gemm_kernel[(min(most_tiles, num_sms * config.ctas_per_sm),)](
        x,
        weights,
        plan.order_N,
        plan.starts_E1,
        work.experts_W,
        work.slots_W,
        work.count_1,
        out,
        num_slots,
        w.stride(0),
        N,
        D,
        num_rows,
        TOP_K=plan.top_k,
        UP=up,
        WP=max(16, triton.next_power_of_2(max_items)),
        BN=config.block_n,
        BT=config.block_t,
        BK=config.block_k,
        GROUP_T=config.group_t,
        TMA=config.tma,
        EVEN=D % config.block_k == 0,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
