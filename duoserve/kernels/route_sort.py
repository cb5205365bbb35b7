"""The routing plan on the device: a stable counting sort of the routed rows by expert, and the lists of experts.

T tokens, K top-k, E experts, R = T * K routed rows, B blocks of rows. EP and RP are powers of two above E and R; ids
outside 0..E-1 count as expert E, which sorts last and belongs to no list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.limits import MAX_EXPERTS
from duoserve.kernels.routed_rows import DeviceWork, RoutePlan

# One CTA sorts up to this many rows by comparing each with all: 2 us of compares at 512. More rows go in blocks.
SMALL_ROWS = 512
BLOCK_ROWS = 256
CHUNK = 32  # rows compared at a time: a BLOCK_ROWS x CHUNK tile of compares stays in registers
SCAN = 1024


@triton.jit
def _load_ids(ids_R, rows, R, E):
    """The expert ids of ``rows``; E for invalid ids, and for rows from R on."""
    ids = tl.load(ids_R + rows, mask=rows < R, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def _rank_among_equals(ids_R, first, mine, here, R, E, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """For each row, how many of the ROWS rows from ``first`` on come before it and have its expert.

    ``mine`` has the ids of the rows, ``here`` their numbers.
    """
    rank = tl.zeros_like(here)
    for chunk in range(0, ROWS, CHUNK):
        rows = first + chunk + tl.arange(0, CHUNK)
        others = _load_ids(ids_R, rows, R, E)
        before = (others[None, :] == mine[:, None]) & (rows[None, :] < here[:, None])
        rank += tl.sum(before.to(tl.int32), axis=1)
    return rank


@triton.jit
def _write_work(work, chosen, slots, experts, E, EP: tl.constexpr):
    """Writes int32 rows [3, E] of a work list: experts, slots and, first in the last row, their count."""
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    count = tl.sum(chosen.to(tl.int32), axis=0)
    unused = (experts >= count) & (experts < E)
    tl.store(work + experts, -1, mask=unused)
    tl.store(work + E + experts, -1, mask=unused)
    tl.store(work + place, experts, mask=chosen)
    tl.store(work + E + place, slots, mask=chosen)
    tl.store(work + 2 * E, count)


@triton.jit
def _write_lists(counts, slots_E, starts_E1, resident, missing, E, EP: tl.constexpr):
    """Writes each expert's first row and the two work lists, from its row count. Returns the first rows."""
    experts = tl.arange(0, EP)
    counts = tl.where(experts < E, counts, 0)
    starts = tl.cumsum(counts, axis=0) - counts
    tl.store(starts_E1 + experts, starts, mask=experts <= E)
    slots = tl.load(slots_E + experts, mask=experts < E, other=-1)
    _write_work(resident, (counts > 0) & (slots >= 0), slots, experts, E, EP)
    _write_work(missing, (counts > 0) & (slots < 0), tl.full([EP], -1, tl.int32), experts, E, EP)
    return starts


# Not specialized: a number of rows must not cause a compilation in the midst of a request.
@triton.jit(do_not_specialize=["R"])
def plan_small_kernel(
    ids_R,
    slots_E,
    order_R,
    starts_E1,
    resident,
    missing,
    R,
    E,
    RP: tl.constexpr,
    EP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The whole plan in one CTA."""
    rows = tl.arange(0, RP)
    ids = _load_ids(ids_R, rows, R, E)
    counts = tl.histogram(tl.where(rows < R, ids, EP - 1), EP)
    starts = _write_lists(counts, slots_E, starts_E1, resident, missing, E, EP)
    place = tl.gather(starts, ids, axis=0) + _rank_among_equals(ids_R, 0, ids, rows, R, E, RP, CHUNK)
    tl.store(order_R + place, rows, mask=rows < R)


@triton.jit(do_not_specialize=["R"])
def count_kernel(ids_R, counts_BE, R, E, ROWS: tl.constexpr, EP: tl.constexpr):
    """Counts the rows of each expert in each block of ROWS rows; expert E stands for rows of no expert."""
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    counts = tl.histogram(tl.where(rows < R, _load_ids(ids_R, rows, R, E), EP - 1), EP)
    experts = tl.arange(0, EP)
    tl.store(counts_BE + block.to(tl.int64) * (E + 1) + experts, counts, mask=experts <= E)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(counts_BE, totals_E, num_blocks, E, SCAN: tl.constexpr):
    """Turns one expert's counts into the rows before each block, and writes their total."""
    expert = tl.program_id(0)
    before = 0
    for first in range(0, num_blocks, SCAN):
        blocks = first + tl.arange(0, SCAN)
        at = counts_BE + blocks.to(tl.int64) * (E + 1) + expert
        counts = tl.load(at, mask=blocks < num_blocks, other=0)
        tl.store(at, before + tl.cumsum(counts, axis=0) - counts, mask=blocks < num_blocks)
        before += tl.sum(counts, axis=0)
    tl.store(totals_E + expert, before)


@triton.jit
def lists_kernel(totals_E, slots_E, starts_E1, resident, missing, E, EP: tl.constexpr):
    """Writes first rows and work lists from the experts' totals."""
    experts = tl.arange(0, EP)
    counts = tl.load(totals_E + experts, mask=experts < E, other=0)
    _write_lists(counts, slots_E, starts_E1, resident, missing, E, EP)


@triton.jit(do_not_specialize=["R"])
def scatter_kernel(ids_R, counts_BE, starts_E1, order_R, R, E, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Puts the rows of one block where they belong."""
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    ids = _load_ids(ids_R, rows, R, E)
    place = tl.load(starts_E1 + ids) + tl.load(counts_BE + block.to(tl.int64) * (E + 1) + ids)
    place += _rank_among_equals(ids_R, block * ROWS, ids, rows, R, E, ROWS, CHUNK)
    tl.store(order_R + place, rows, mask=rows < R)


def route_plan(topk_ids_TK: Tensor, slots_E: Tensor) -> RoutePlan:
    """Sorts the routed rows stably by expert; see :class:`RoutePlan` and the twin in ``reference``.

    Up to SMALL_ROWS rows it takes one launch, else four. Raises KernelError for wrong dtypes or shapes.
    """
    check_route(topk_ids_TK, slots_E)
    num_tokens, top_k = topk_ids_TK.shape
    num_rows, num_experts = num_tokens * top_k, len(slots_E)
    order_R = slots_E.new_empty(num_rows)
    starts_E1 = slots_E.new_empty(num_experts + 1)
    lists = slots_E.new_empty(2, 3, num_experts)
    if num_rows <= SMALL_ROWS:
        _plan_small(topk_ids_TK, slots_E, order_R, starts_E1, lists)
    else:
        _plan_large(topk_ids_TK, slots_E, order_R, starts_E1, lists)
    resident, missing = (DeviceWork(experts, slots, count[:1]) for experts, slots, count in lists)
    return RoutePlan(order_R, starts_E1, resident, missing, top_k)


def check_route(topk_ids_TK: Tensor, slots_E: Tensor) -> None:
    """Checks the operands of ``route_plan``; raises KernelError, which says what is wrong with them."""
    check_tensor("topk_ids_TK", topk_ids_TK, (None, None), (torch.int32, torch.int64))
    check_tensor("slots_E", slots_E, (None,), (torch.int32,))
    check_contiguous(topk_ids_TK=topk_ids_TK, slots_E=slots_E)
    check_one_device(topk_ids_TK=topk_ids_TK, slots_E=slots_E)
    require(0 < len(slots_E) <= MAX_EXPERTS, f"slots_E has {len(slots_E)} experts; 1 to {MAX_EXPERTS} are supported")
    require(topk_ids_TK.numel() > 0, "topk_ids_TK is empty")
    require(topk_ids_TK.numel() < 2**30, f"{topk_ids_TK.numel()} routed rows are more than 2^30")


def _plan_small(ids: Tensor, slots_E: Tensor, order_R: Tensor, starts_E1: Tensor, lists: Tensor) -> None:
    num_rows, num_experts = len(order_R), len(slots_E)
    padded = max(CHUNK, triton.next_power_of_2(num_rows))
    plan_small_kernel[(1,)](
        ids,
        slots_E,
        order_R,
        starts_E1,
        lists[0],
        lists[1],
        num_rows,
        num_experts,
        RP=padded,
        EP=_bins(num_experts),
        CHUNK=CHUNK,
        num_warps=4 if padded <= 64 else 8,
    )


def _plan_large(ids: Tensor, slots_E: Tensor, order_R: Tensor, starts_E1: Tensor, lists: Tensor) -> None:
    num_rows, num_experts = len(order_R), len(slots_E)
    num_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    counts_BE = slots_E.new_empty(num_blocks, num_experts + 1)
    totals_E = slots_E.new_empty(num_experts + 1)
    bins = _bins(num_experts)
    count_kernel[(num_blocks,)](ids, counts_BE, num_rows, num_experts, ROWS=BLOCK_ROWS, EP=bins)
    scan_kernel[(num_experts + 1,)](counts_BE, totals_E, num_blocks, num_experts, SCAN=SCAN)
    lists_kernel[(1,)](totals_E, slots_E, starts_E1, lists[0], lists[1], num_experts, EP=bins)
    scatter_kernel[(num_blocks,)](
        ids, counts_BE, starts_E1, order_R, num_rows, num_experts, ROWS=BLOCK_ROWS, CHUNK=CHUNK, num_warps=8
    )


def _bins(num_experts: int) -> int:
    """Bins of the histogram: one for each expert, one for rows of no expert and one for padding."""
    return max(16, int(triton.next_power_of_2(num_experts + 2)))
