"""Read-through: experts that are in no slot yet are computed from pinned host memory, which fills their slots as well.

T tokens, K top-k, E experts, H hidden, I expert intermediate, R = T * K routed rows. The kernels read each weight once
through the link, compute with it and store it where it belongs, so a miss costs the time of the link and no more. That
holds, and the slot gets every byte, because one CTA owns a tile of weights and meets all rows of its expert at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.configs import MEDIUM, SMALL, GemmConfig, gemm_config
from duoserve.kernels.moe_checks import check_operands, check_rows
from duoserve.kernels.moe_gemm import item_tiles, machine, matrix_product, silu_up
from duoserve.kernels.numerics import interpreting, to_dtype
from duoserve.kernels.routing import RoutePlan, Work
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix

MAX_TOKENS = MEDIUM  # an expert's rows, at most one for each token, must fit one tile


@triton.jit
def _filling_product(
    x,
    x_rows,
    source,
    target,
    first_n,
    N,
    D,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``W x^T`` as ``moe_gemm`` computes it, step by step, with W read from ``source`` and stored to ``target``."""
    k = tl.arange(0, BK)
    n = first_n + tl.arange(0, BN)
    x_at = x + x_rows.to(tl.int64)[None, :] * D + k[:, None]
    w_at = tl.minimum(n, N - 1)[:, None] * D + k[None, :]
    acc = tl.zeros((BN, BT), tl.float32)
    for first_k in range(0, D, BK):
        inside = k < D - first_k
        x_tile = tl.load(x_at) if EVEN else tl.load(x_at, mask=inside[:, None], other=0.0)
        w_tile = tl.load(source + w_at) if EVEN else tl.load(source + w_at, mask=inside[None, :], other=0.0)
        tl.store(target + w_at, w_tile, mask=(n < N)[:, None] & inside[None, :])
        acc = matrix_product(w_tile, x_tile, acc, INTERPRET)
        x_at += BK
        w_at += BK
    return acc


@triton.jit
def moe_fill_kernel(
    x,
    w,
    addresses_E,
    order_R,
    starts_E1,
    experts_W,
    slots_W,
    count_1,
    out,
    num_slots,
    slot_stride,
    source_offset,
    N,
    D,
    num_rows,
    TOP_K: tl.constexpr,
    UP: tl.constexpr,
    WP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``moe_up_fill`` (UP) or ``moe_down_fill``; an expert has as many tiles as its weights, whatever its rows."""
    items = tl.arange(0, WP)
    tiles = item_tiles(experts_W, starts_E1, tl.load(count_1), items, tl.cdiv(N, BN), BT)
    ends = tl.cumsum(tiles, axis=0)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0)):
        item = tl.sum((ends <= tile).to(tl.int32), axis=0)
        first_n = (tile - tl.sum(tl.where(items == item, ends - tiles, 0), axis=0)) * BN
        expert = tl.load(experts_W + item)
        slot = tl.load(slots_W + item)
        address = tl.load(addresses_E + expert)
        first = tl.load(starts_E1 + expert)
        rows = first + tl.arange(0, BT)
        used = rows < tl.load(starts_E1 + expert + 1)
        order = tl.load(order_R + rows, mask=used, other=0)
        x_rows = order // TOP_K if UP else tl.minimum(rows, num_rows - 1)
        acc = tl.full((BN, BT), float("nan"), tl.float32)
        if (slot >= 0) & (slot < num_slots) & (address != 0):
            source = tl.multiple_of((address + source_offset).to(tl.pointer_type(w.dtype.element_ty)), 16)
            target = w + slot.to(tl.int64) * slot_stride
            acc = _filling_product(x, x_rows, source, target, first_n, N, D, BN, BT, BK, EVEN, INTERPRET)
        if UP:
            result = silu_up(acc, BN, BT)
            columns = first_n // 2 + tl.arange(0, BN // 2)
            width = N // 2
            out_rows = rows
        else:
            result = acc
            columns = first_n + tl.arange(0, BN)
            width = N
            out_rows = order
        at = out + out_rows.to(tl.int64)[None, :] * width + columns[:, None]
        mask = used[None, :] & (columns < width)[:, None]
        tl.store(at, to_dtype(result, out.dtype.element_ty, INTERPRET), mask=mask)


def moe_up_fill(
    x_TH: Tensor, weights: ExpertWeights, addresses_E: Tensor, plan: RoutePlan, work: Work, act_RI: Tensor
) -> None:
    """``moe_up`` with w13 read from host rows and stored into the slots that ``work`` names; the same bits.

    ``addresses_E`` (int64, on the device) has the address of each expert's row in memory that the device can read, a
    multiple of 16; the row is laid out as a slot. An expert whose address is 0, or whose slot does not exist, gives
    NaN. At most MAX_TOKENS tokens, FLOAT weights. A slot is whole once ``moe_down_fill`` has run too, with the same
    ``work``. KernelError for operands that do not fit.
    """
    hidden, inter = _check(weights, addresses_E, plan, work)
    check_rows("x_TH", x_TH, (len(plan.order_N) // plan.top_k, hidden), weights)
    check_rows("act_RI", act_RI, (len(plan.order_N), inter), weights, like=x_TH)
    _launch(x_TH, weights.w13, addresses_E, 0, plan, work, act_RI)


def moe_down_fill(
    act_RI: Tensor, weights: ExpertWeights, addresses_E: Tensor, plan: RoutePlan, work: Work, y_RH: Tensor
) -> None:
    """``moe_down`` with w2 read from host rows and stored into the slots; everything else as in ``moe_up_fill``."""
    hidden, inter = _check(weights, addresses_E, plan, work)
    check_rows("act_RI", act_RI, (len(plan.order_N), inter), weights)
    check_rows("y_RH", y_RH, (len(plan.order_N), hidden), weights, like=act_RI)
    offset = weights.w2_SHI.data_ptr() - weights.w13_SNH.data_ptr()
    _launch(act_RI, weights.w2, addresses_E, offset, plan, work, y_RH)


def fill_config(dtype: torch.dtype, arch: int, num_tokens: int) -> GemmConfig:
    """The GEMMs' tiles for as many rows as there are tokens, by pointers: the link is slower than any way to load.

    Few CTAs and five stages are enough for a link, and these tiles do not tempt ptxas to spill for more CTAs.
    """
    config = gemm_config(dtype, arch, SMALL if num_tokens <= SMALL else MEDIUM, tma_fits=False)
    if dtype == torch.float32:
        return config
    return replace(config, num_stages=5, block_n=128 if num_tokens <= SMALL else config.block_n)


def _check(weights: ExpertWeights, addresses_E: Tensor, plan: RoutePlan, work: Work) -> tuple[int, int]:
    shapes = check_operands(weights, plan, work)
    require(weights.format is ExpertFormat.FLOAT, f"read-through takes FLOAT weights, not {weights.format.value}")
    check_tensor("addresses_E", addresses_E, (len(plan.starts_E1) - 1,), (torch.int64,))
    check_contiguous(addresses_E=addresses_E)
    check_one_device(addresses_E=addresses_E, weights=weights.w13_SNH)
    num_tokens = len(plan.order_N) // plan.top_k
    require(num_tokens <= MAX_TOKENS, f"read-through takes up to {MAX_TOKENS} tokens, not {num_tokens}")
    return shapes


def _launch(
    x: Tensor, matrix: Matrix, addresses_E: Tensor, source_offset: int, plan: RoutePlan, work: Work, out: Tensor
) -> None:
    w, num_rows, max_items = matrix.data_SNB, len(plan.order_N), len(work.experts_W)
    num_slots, N, D = w.shape
    if num_rows == 0 or max_items == 0 or num_slots == 0:
        return
    arch, num_sms = machine(w.device)
    config = fill_config(w.dtype, arch, num_rows // plan.top_k)
    most_tiles = triton.cdiv(N, config.block_n) * min(max_items, num_rows)
    moe_fill_kernel[(min(most_tiles, num_sms),)](
        x,
        w,
        addresses_E,
        plan.order_N,
        plan.starts_E1,
        work.experts_W,
        work.slots_W,
        work.count_1,
        out,
        num_slots,
        w.stride(0),
        source_offset,
        N,
        D,
        num_rows,
        TOP_K=plan.top_k,
        UP=matrix.interleaved,
        WP=max(16, triton.next_power_of_2(max_items)),
        BN=config.block_n,
        BT=config.block_t,
        BK=config.block_k,
        EVEN=D % config.block_k == 0,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
