"""The grouped GEMMs of the experts: weights read from the slots where they lie, rows gathered and scattered in place.

T tokens, K top-k, S slots, H hidden, I expert intermediate, R = T * K routed rows. In a kernel N is the weight's rows
(2I or H) and D its inner dimension (H or I); a tile is BN weight rows by BT routed rows by BK of D. The weights are
the left operand of the product, so that the side which tensor cores want wide is the weights, however few rows come.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from duoserve.kernels.checks import require
from duoserve.kernels.configs import GemmConfig, gemm_config, scale_group, shape_class
from duoserve.kernels.dequant import codes_of, decode_e2m1, decode_fp8, decode_int4, e8m0
from duoserve.kernels.machine import machine
from duoserve.kernels.moe_bf12 import bf12_product
from duoserve.kernels.moe_checks import check_clamped, check_operands, check_rows, tma_fits
from duoserve.kernels.moe_store import clamp_operands, store_rows
from duoserve.kernels.numerics import full_float32, interpreting, matrix_product, step_product
from duoserve.kernels.routed_rows import RoutePlan, Work
from duoserve.kernels.weights import ClampedUp, ExpertFormat, ExpertWeights, Matrix


@triton.jit
def _item_tiles(experts_W, starts_E1, count, items, num_n, BT: tl.constexpr):
    """How many tiles each entry of the work list has."""
    experts = tl.load(experts_W + items, mask=items < count, other=0)
    rows = tl.load(starts_E1 + experts + 1) - tl.load(starts_E1 + experts)
    return tl.where(items < count, tl.cdiv(rows, BT) * num_n, 0)


@triton.jit
def _place_in_expert(tile, num_t, num_n, GROUP_T: tl.constexpr):
    """Which tile t of rows and n of weights an expert's ``tile`` is.

    They are counted in bands of GROUP_T tiles of rows, one band after another; within a band t counts fastest.
    """
    band = tile // (GROUP_T * num_n)
    first_t = band * GROUP_T
    band_t = tl.minimum(num_t - first_t, GROUP_T)
    in_band = tile - band * GROUP_T * num_n
    return first_t + in_band % band_t, in_band // band_t


@triton.jit
def _decode(tile, z_at, dtype: tl.constexpr, FORMAT: tl.constexpr, FP8_HARDWARE: tl.constexpr, INTERPRET: tl.constexpr):
    """Decodes a tile of stored weights to ``dtype``, without its scales."""
    if FORMAT == "int8":
        return tile.to(tl.float32 if INTERPRET else dtype)
    elif FORMAT == "fp8":
        return decode_fp8(tile, dtype, FP8_HARDWARE, INTERPRET)
    elif FORMAT == "int4":
        return decode_int4(codes_of(tile, tile.shape[0], tile.shape[1] * 2), tl.load(z_at), dtype, INTERPRET)
    elif FORMAT == "mxfp4":
        return decode_e2m1(codes_of(tile, tile.shape[0], tile.shape[1] * 2), dtype, INTERPRET)
    else:
        return tile


@triton.jit
def _scale_columns(n, UP: tl.constexpr, FORMAT: tl.constexpr):
    """The column of [G, N] with row n's scales; for fp8 its row of blocks, which in w13 are gate and up in turn."""
    if FORMAT == "fp8":
        return n // 256 * 2 + n % 2 if UP else n // 128
    else:
        return n


@triton.jit
def product(
    x,
    x_rows,
    w,
    scales,
    zeros,
    slot,
    slot_stride,
    scales_stride,
    zeros_stride,
    first_n,
    N,
    D,
    UP: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ARCH: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``W x^T`` in float32 [BN, BT] for BN weight rows from ``first_n`` on and the rows of x at ``x_rows``.

    In place of weight rows past N and of unused x rows, rows that exist are read: their results are never stored. Where
    GROUP weights of a row share a scale, a step lies within one group, and its sums are scaled before they are added.
    """
    if FORMAT == "bf12":
        return bf12_product(
            x,
            x_rows,
            w,
            scales,
            slot,
            slot_stride,
            scales_stride,
            first_n,
            N,
            D,
            BN,
            BT,
            BK,
            ARCH,
            EVEN,
            INTERPRET,
        )
    else:
        PER_BYTE: tl.constexpr = 2 if (FORMAT == "int4") | (FORMAT == "mxfp4") else 1
        k = tl.arange(0, BK)
        x_at = x + x_rows.to(tl.int64)[None, :] * D + k[:, None]
        n = tl.minimum(first_n + tl.arange(0, BN), N - 1)
        b = tl.arange(0, BK // PER_BYTE)
        if not TMA:
            row = D if PER_BYTE == 1 else tl.multiple_of(D // 2, 16)  # groups of 32 or more have 16 bytes or more
            w_at = w + slot.to(tl.int64) * slot_stride + n[:, None] * row + b[None, :]
        s_at = scales
        z_at = zeros
        if FORMAT != "float":
            s_at = (
                scales
                + slot.to(tl.int64) * scales_stride
                + _scale_columns(n, UP, FORMAT) * (tl.cdiv(D, GROUP) if FORMAT == "fp8" else 1)
            )
        if FORMAT == "int4":
            z_at = zeros + slot.to(tl.int64) * zeros_stride + n
        acc = tl.zeros((BN, BT), tl.float32)
        for first_k in range(0, D, BK):
            left = D - first_k
            x_tile = tl.load(x_at) if EVEN else tl.load(x_at, mask=k[:, None] < left, other=0.0)
            if TMA:
                w_tile = w.load([slot, first_n, first_k // PER_BYTE]).reshape(BN, BK // PER_BYTE)
            else:
                w_tile = tl.load(w_at) if EVEN else tl.load(w_at, mask=b[None, :] < left, other=0)
                w_at += BK // PER_BYTE
            x_at += BK
            group = first_k // GROUP * (1 if FORMAT == "fp8" else N) if GROUP else 0
            w_tile = _decode(w_tile, z_at + group, x.dtype.element_ty, FORMAT, ARCH >= 89, INTERPRET)
            if (FORMAT != "float") & (x.dtype.element_ty == tl.float32) & (not INTERPRET):
                w_tile = full_float32(w_tile)
            if GROUP:
                scale = tl.load(s_at + group)
                scale = e8m0(scale) if FORMAT == "mxfp4" else scale.to(tl.float32)
                acc += matrix_product(w_tile, x_tile, tl.zeros((BN, BT), tl.float32), INTERPRET) * scale[:, None]
            else:
                acc = step_product(w_tile, x_tile, acc, FORMAT != "float", ARCH, INTERPRET)
        if FORMAT == "int8":
            acc *= tl.load(s_at)[:, None]
        return acc


# A work list of the host's has any length, so its parts may lie at any address, and a step has any number of rows. None
# of these is worth a compilation in the midst of a request.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots_W", "count_1"])
def moe_gemm_kernel(
    x,
    w,
    scales,
    zeros,
    order_R,
    starts_E1,
    experts_W,
    slots_W,
    count_1,
    out,
    num_slots,
    slot_stride,
    scales_stride,
    zeros_stride,
    N,
    D,
    num_rows,
    bias,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    UP: tl.constexpr,
    CLAMPED: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ARCH: tl.constexpr,
    WP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Computes ``moe_up`` (UP) or ``moe_down``: the CTAs take turns at the tiles of all experts in the work list."""
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
        acc = product(
            x,
            x_rows,
            w,
            scales,
            zeros,
            slot,
            slot_stride,
            scales_stride,
            zeros_stride,
            n * BN,
            N,
            D,
            UP,
            FORMAT,
            GROUP,
            ARCH,
            BN,
            BT,
            BK,
            TMA,
            EVEN,
            INTERPRET,
        )
        acc = tl.where(there, acc, float("nan"))  # an expert in no slot must be heard of
        store_rows(out, acc, n * BN, rows, order, used, N, bias, expert, alpha, limit, UP, CLAMPED, BN, BT, INTERPRET)


def moe_up(
    x_TH: Tensor,
    weights: ExpertWeights,
    plan: RoutePlan,
    work: Work,
    act_RI: Tensor,
    clamped: ClampedUp | None = None,
    config: GemmConfig | None = None,
) -> None:
    """Writes ``silu(x w1^T) * (x w3^T)`` for the rows of each expert in ``work``, to their sorted rows of ``act_RI``.

    Where ``clamped`` is given, its formula replaces this one. Other rows of ``act_RI`` are not touched; an expert
    without a slot gives NaN. Activations are float32, float16 or bfloat16, and so are FLOAT weights; sums are float32.
    Without a ``config`` the table's is taken. Raises KernelError for operands that do not fit.
    """
    hidden, inter = check_operands(weights, plan, work)
    check_rows("x_TH", x_TH, (len(plan.order_R) // plan.top_k, hidden), weights)
    check_rows("act_RI", act_RI, (len(plan.order_R), inter), weights, like=x_TH)
    if clamped is not None:
        check_clamped(clamped, weights, plan)
    _launch(x_TH, weights.w13, plan, work, act_RI, config, clamped)


def moe_down(
    act_RI: Tensor, weights: ExpertWeights, plan: RoutePlan, work: Work, y_RH: Tensor, config: GemmConfig | None = None
) -> None:
    """Writes ``act w2^T`` of each expert in ``work``, unweighted, to its rows' places ``token * K + j`` in ``y_RH``.

    Other rows of ``y_RH`` are not touched. Dtypes, ``config`` and errors as in ``moe_up``.
    """
    hidden, inter = check_operands(weights, plan, work)
    check_rows("act_RI", act_RI, (len(plan.order_R), inter), weights)
    check_rows("y_RH", y_RH, (len(plan.order_R), hidden), weights, like=act_RI)
    _launch(act_RI, weights.w2, plan, work, y_RH, config)


def moe_experts(
    x_TH: Tensor,
    weights: ExpertWeights,
    plan: RoutePlan,
    work: Work,
    act_RI: Tensor,
    y_RH: Tensor,
    clamped: ClampedUp | None = None,
) -> None:
    """Runs ``moe_up``, then ``moe_down``, and raises what they raise."""
    moe_up(x_TH, weights, plan, work, act_RI, clamped)
    moe_down(act_RI, weights, plan, work, y_RH)


def choose_config(x: Tensor, matrix: Matrix, plan: RoutePlan) -> GemmConfig:
    """The table's row for these operands."""
    num_experts = len(plan.starts_E1) - 1
    block_t = shape_class(len(plan.order_R) // plan.top_k, plan.top_k, num_experts)
    arch, _ = machine(x.device)
    return gemm_config(x.dtype, arch, block_t, tma_fits(matrix.data_SNB), matrix.format, matrix.group)


def _launch(
    x: Tensor,
    matrix: Matrix,
    plan: RoutePlan,
    work: Work,
    out: Tensor,
    config: GemmConfig | None,
    clamped: ClampedUp | None = None,
) -> None:
    w, scales, zeros = matrix.data_SNB, matrix.scales_SGN, matrix.zeros_SGN
    num_slots, N, _ = w.shape
    num_rows, max_items = len(plan.order_R), len(work.experts_W)
    if num_rows == 0 or max_items == 0 or num_slots == 0:
        return
    _, num_sms = machine(w.device)
    config = config or choose_config(x, matrix, plan)
    most_tiles = triton.cdiv(N, config.block_n) * (num_rows // config.block_t + min(max_items, num_rows))
    moe_gemm_kernel[(min(most_tiles, num_sms * config.ctas_per_sm),)](
        x,
        descriptor(matrix, config) if config.tma else w,
        x if scales is None else scales,
        x if zeros is None else zeros,
        plan.order_R,
        plan.starts_E1,
        work.experts_W,
        work.slots_W,
        work.count_1,
        out,
        num_slots,
        w.stride(0),
        0 if scales is None else scales.stride(0),
        0 if zeros is None else zeros.stride(0),
        N,
        matrix.inner,
        num_rows,
        *clamp_operands(clamped, x),
        WP=triton.next_power_of_2(max(16, len(plan.starts_E1) - 1, max_items)),
        GROUP_T=config.group_t,
        TMA=config.tma,
        **compiled_for(matrix, plan, config, clamped),
    )


def compiled_for(matrix: Matrix, plan: RoutePlan, config: GemmConfig, clamped: ClampedUp | None) -> dict[str, Any]:
    """The constants of ``product`` and ``store_rows``, for every kernel that calls them, and the launch's options."""
    arch, _ = machine(matrix.data_SNB.device)
    return {
        "TOP_K": plan.top_k,
        "UP": matrix.interleaved,
        "CLAMPED": clamped is not None,
        "FORMAT": matrix.format.value,
        "GROUP": scale_group(matrix.format, matrix.group),
        "ARCH": arch,
        "BN": config.block_n,
        "BT": config.block_t,
        "BK": config.block_k,
        "EVEN": matrix.inner % config.block_k == 0,
        "INTERPRET": interpreting(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }


def descriptor(matrix: Matrix, config: GemmConfig) -> TensorDescriptor:
    """The descriptor by which TMA reads tiles [1, BN, BK] of the weights from the slots.

    Raises KernelError for weights that TMA cannot read.
    """
    w = matrix.data_SNB
    require(matrix.format is not ExpertFormat.BF12, "bf12 is read through pointers, not by a tensor descriptor")
    require(tma_fits(w), "a tensor descriptor needs addresses and strides in multiples of 16 bytes")
    columns = config.block_k // (2 if matrix.format.packs_two else 1)
    return TensorDescriptor(w, list(w.shape), list(w.stride()), [1, config.block_n, columns])
