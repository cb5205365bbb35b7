"""Read-through: experts that are in no slot yet come from pinned host memory and are computed as they arrive.

T tokens, K top-k, E experts, H hidden, I expert intermediate, R = T * K routed rows. A CTA owns a tile of weights: it
brings the whole tile through the link into the slot, once and with the widest loads, and then computes from there,
where the tile is in the L2 cache. So a miss costs the time of the link and that of one CTA's tile; the other CTAs keep
the link busy meanwhile. No CTA reads what another writes otherwise than it does itself, and the product is that of
``moe_gemm``, hence its bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_one_device, check_tensor, require
from duoserve.kernels.configs import MEDIUM, SMALL, GemmConfig, gemm_config, shape_class
from duoserve.kernels.host_rows import ROW_ALIGNMENT, HostRows, check_addresses, offset_in_row
from duoserve.kernels.machine import machine
from duoserve.kernels.moe_bf12 import bytes_of_row
from duoserve.kernels.moe_checks import check_clamped, check_operands, check_rows
from duoserve.kernels.moe_gemm import compiled_for, product
from duoserve.kernels.moe_store import clamp_operands, store_rows
from duoserve.kernels.routed_rows import RoutePlan, Work
from duoserve.kernels.weights import ClampedUp, ExpertFormat, ExpertWeights, Matrix

MAX_TOKENS = MEDIUM  # more are a prefill, which has other work to hide its copies behind
THREAD_BYTES = 128  # under way for each thread: eight loads of 16 bytes


@triton.jit
def _part(address, offset, like):
    """A pointer into the expert's row at ``address``, at byte ``offset``, to elements of the dtype of ``like``."""
    return tl.multiple_of((address + offset).to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def _copy_run(source, target, first, last, CHUNK: tl.constexpr):
    """One CTA copies elements ``first`` to ``last``."""
    at = tl.arange(0, CHUNK)
    for begin in range(first, last, CHUNK):
        inside = at < last - begin
        tl.store(target + begin + at, tl.load(source + begin + at, mask=inside), mask=inside)


@triton.jit
def _copy_columns(source, target, rows, stride, first, last, COLUMNS: tl.constexpr, ROWS: tl.constexpr = 32):
    """One CTA copies columns ``first`` to ``last``, at most COLUMNS, of a matrix [rows, stride]."""
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    for first_row in range(0, rows, ROWS):
        at = (first_row + row)[:, None] * stride + column[None, :]
        inside = (first_row + row < rows)[:, None] & (column < last)[None, :]
        tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


@triton.jit
def _fill_tile(
    address,
    w,
    scales,
    zeros,
    w_from,
    scales_from,
    zeros_from,
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
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copies weight rows ``first_n`` to ``first_n + BN``, and what decodes them, from ``address`` into ``slot``."""
    last_n = tl.minimum(first_n + BN, N)
    slot = slot.to(tl.int64)
    width = D // 2 if (FORMAT == "int4") | (FORMAT == "mxfp4") else bytes_of_row(D) if FORMAT == "bf12" else D
    w_slot = w + slot * slot_stride
    _copy_run(_part(address, w_from, w), w_slot, first_n * width, last_n * width, CHUNK)
    if FORMAT != "float":
        s_row = _part(address, scales_from, scales)
        s_slot = scales + slot * scales_stride
        if FORMAT == "fp8":
            # A tile lies in one block of rows (UP: one of gate rows and one of up rows). Other tiles of the block copy
            # the same scales: whoever is last writes what was there.
            blocks = tl.cdiv(D, 128)
            first = (first_n // 256 * 2 if UP else first_n // 128) * blocks
            _copy_run(s_row, s_slot, first, first + (2 if UP else 1) * blocks, CHUNK)
        else:
            groups = 1 if (FORMAT == "int8") | (FORMAT == "bf12") else D // GROUP
            _copy_columns(s_row, s_slot, groups, N, first_n, last_n, BN)
    if FORMAT == "int4":
        z_slot = zeros + slot * zeros_stride
        _copy_columns(_part(address, zeros_from, zeros), z_slot, D // GROUP, N, first_n, last_n, BN)


# As in ``moe_gemm_kernel``. The lists of a layer lie wherever those of the layers before it end.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots_W", "count_1"])
def moe_fill_kernel(
    x,
    w,
    scales,
    zeros,
    addresses_E,
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
    w_from,
    scales_from,
    zeros_from,
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
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Computes ``moe_up_fill`` (UP) or ``moe_down_fill``: the CTAs take turns at the work list's tiles of weights."""
    num_n = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.load(count_1) * num_n, tl.num_programs(0)):
        item = tile // num_n
        first_n = (tile - item * num_n) * BN
        expert = tl.load(experts_W + item)
        slot = tl.load(slots_W + item)
        address = tl.load(addresses_E + expert)
        there = (slot >= 0) & (slot < num_slots) & (address != 0)
        slot = tl.where(there, slot, 0)
        if there:
            _fill_tile(
                address,
                w,
                scales,
                zeros,
                w_from,
                scales_from,
                zeros_from,
                slot,
                slot_stride,
                scales_stride,
                zeros_stride,
                first_n,
                N,
                D,
                UP,
                FORMAT,
                GROUP,
                BN,
                CHUNK,
            )
        tl.debug_barrier()  # what the CTA's other threads stored is read below
        last = tl.load(starts_E1 + expert + 1)
        for first in range(tl.load(starts_E1 + expert), last, BT):
            rows = first + tl.arange(0, BT)
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
                first_n,
                N,
                D,
                UP,
                FORMAT,
                GROUP,
                ARCH,
                BN,
                BT,
                BK,
                False,
                EVEN,
                INTERPRET,
            )
            acc = tl.where(there, acc, float("nan"))
            store_rows(
                out, acc, first_n, rows, order, used, N, bias, expert, alpha, limit, UP, CLAMPED, BN, BT, INTERPRET
            )


def moe_up_fill(
    x_TH: Tensor,
    weights: ExpertWeights,
    source: HostRows,
    plan: RoutePlan,
    work: Work,
    act_RI: Tensor,
    clamped: ClampedUp | None = None,
) -> None:
    """Does as ``moe_up``, bit by bit, and brings w13 and its scales from ``source`` into the slots that ``work`` names.

    It takes any format, and at most MAX_TOKENS tokens. An expert that ``source`` has no row of, or whose slot does not
    exist, gives NaN; one without routed rows is brought all the same. A slot is whole once ``moe_down_fill`` has run
    too, with the same ``work``. ``moe_gemv_up`` has other bits: ``page_gather`` brings experts for those who need them.
    Raises KernelError for operands that do not fit.
    """
    hidden, inter = _check(weights, source, plan, work)
    check_rows("x_TH", x_TH, (len(plan.order_R) // plan.top_k, hidden), weights)
    check_rows("act_RI", act_RI, (len(plan.order_R), inter), weights, like=x_TH)
    if clamped is not None:
        check_clamped(clamped, weights, plan)
    _launch(x_TH, weights, weights.w13, source, plan, work, act_RI, clamped)


def moe_down_fill(
    act_RI: Tensor, weights: ExpertWeights, source: HostRows, plan: RoutePlan, work: Work, y_RH: Tensor
) -> None:
    """Does as ``moe_down``, and brings w2 and its scales from ``source`` into the slots; else as ``moe_up_fill``."""
    hidden, inter = _check(weights, source, plan, work)
    check_rows("act_RI", act_RI, (len(plan.order_R), inter), weights)
    check_rows("y_RH", y_RH, (len(plan.order_R), hidden), weights, like=act_RI)
    _launch(act_RI, weights, weights.w2, source, plan, work, y_RH)


def fill_config(
    dtype: torch.dtype, arch: int, block_t: int, format: ExpertFormat = ExpertFormat.FLOAT, group: int = 0
) -> GemmConfig:
    """The GEMMs' tiles for ``block_t``, at most MEDIUM. They load by pointers: TMA would not see what threads stored.

    float32 takes 16 rows at a time by 8 warps, whatever the table says: with wider tiles or fewer warps ptxas spills.
    With BF12 it takes 4 warps, for 8 spill on sm_80.
    """
    if dtype == torch.float32:
        num_warps = 4 if format is ExpertFormat.BF12 else 8
        return replace(gemm_config(dtype, arch, SMALL, False, format, group), num_warps=num_warps, num_stages=3)
    return gemm_config(dtype, arch, min(block_t, MEDIUM), False, format, group)


def _check(weights: ExpertWeights, source: HostRows, plan: RoutePlan, work: Work) -> tuple[int, int]:
    shapes = check_operands(weights, plan, work)
    check_addresses(source)
    num_experts, num_tokens = len(plan.starts_E1) - 1, len(plan.order_R) // plan.top_k
    check_tensor("addresses_E", source.addresses_E, (num_experts,), (torch.int64,))
    check_one_device(addresses_E=source.addresses_E, weights=weights.w13_SNH)
    require(num_tokens <= MAX_TOKENS, f"read-through takes up to {MAX_TOKENS} tokens, not {num_tokens}")
    for part in weights.w13.parts + weights.w2.parts:
        _check_place(part, weights, source.row_bytes)
    return shapes


def _check_place(part: Tensor, weights: ExpertWeights, row_bytes: int | None) -> None:
    """Checks that ``part`` lies in the host's rows where it lies in a slot, and that wide loads can read it there."""
    one_pool = part.untyped_storage().data_ptr() == weights.w13_SNH.untyped_storage().data_ptr()
    require(one_pool, "the parts of an expert are not views of one pool")
    start = offset_in_row(part, weights)
    stop = start + part.shape[1:].numel() * part.element_size()
    require(start >= 0 and start % ROW_ALIGNMENT == 0, f"a part of an expert begins at byte {start} of its row")
    require(row_bytes is None or stop <= row_bytes, f"the rows have {row_bytes} bytes; the experts need {stop}")


def _launch(
    x: Tensor,
    weights: ExpertWeights,
    matrix: Matrix,
    source: HostRows,
    plan: RoutePlan,
    work: Work,
    out: Tensor,
    clamped: ClampedUp | None = None,
) -> None:
    w, scales, zeros = matrix.data_SNB, matrix.scales_SGN, matrix.zeros_SGN
    num_slots, N, _ = w.shape
    num_rows, max_items = len(plan.order_R), len(work.experts_W)
    if num_rows == 0 or max_items == 0 or num_slots == 0:
        return
    arch, num_sms = machine(w.device)
    block_t = shape_class(num_rows // plan.top_k, plan.top_k, len(plan.starts_E1) - 1)
    config = fill_config(x.dtype, arch, block_t, matrix.format, matrix.group)
    moe_fill_kernel[(min(triton.cdiv(N, config.block_n) * max_items, num_sms * config.ctas_per_sm),)](
        x,
        w,
        x if scales is None else scales,
        x if zeros is None else zeros,
        source.addresses_E,
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
        offset_in_row(w, weights),
        0 if scales is None else offset_in_row(scales, weights),
        0 if zeros is None else offset_in_row(zeros, weights),
        N,
        matrix.inner,
        num_rows,
        *clamp_operands(clamped, x),
        CHUNK=32 * config.num_warps * THREAD_BYTES // w.element_size(),
        **compiled_for(matrix, plan, config, clamped),
    )
