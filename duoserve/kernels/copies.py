"""Copies experts from host memory into slots by a kernel, so that the host need not know which before they move.

E experts, S slots, B bytes of a row, W entries of a work list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_contiguous, check_one_device, check_tensor, require
from duoserve.kernels.host_rows import ROW_ALIGNMENT, HostRows, check_addresses
from duoserve.kernels.machine import machine
from duoserve.kernels.routed_rows import Work

# A link of about 64 GB/s with a latency of about 2 us needs 128 KB under way. Sixteen CTAs have 256 KB under way, and
# leave the other SMs to the computation. Not measured yet.
COPY_CTAS = 16
COPY_WORDS = 2048  # words of 8 bytes: four loads of 16 bytes for each thread of COPY_WARPS
COPY_WARPS = 8


@triton.jit
def page_gather_kernel(addresses_E, experts_W, slots_W, count_1, pool, num_slots, row_words, CHUNK: tl.constexpr):
    """CTAs take the chunks of all rows in turn, so that neighbouring chunks are read at the same time."""
    chunks = tl.cdiv(row_words, CHUNK)
    at = tl.arange(0, CHUNK)
    for step in range(tl.program_id(0), tl.load(count_1) * chunks, tl.num_programs(0)):
        item = step // chunks
        first = (step - item * chunks) * CHUNK
        slot = tl.load(slots_W + item)
        address = tl.load(addresses_E + tl.load(experts_W + item))
        # Conditions on scalars go into the bounds: the interpreter of Triton 3.9 has no `&` of a block and a scalar.
        readable = tl.where(address != 0, row_words - first, 0)
        writable = tl.where((slot >= 0) & (slot < num_slots), row_words - first, 0)
        source = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16) + first
        words = tl.load(source + at, mask=at < readable, other=-1)  # all bits set: NaN in every format
        target = pool + slot.to(tl.int64) * row_words + first
        tl.store(target + at, words, mask=at < writable)


def page_gather(source: HostRows, work: Work, pool_SB: Tensor) -> None:
    """Copies the row of each expert in ``work`` from host memory into its slot, a row of ``pool_SB`` (uint8).

    The device reads ``work``, and its count need not be known to the host. If ``source`` has no row of an expert, its
    slot is filled with NaN. An expert whose slot does not exist is left out, and is NaN when it is computed. Raises
    KernelError for operands that do not fit.
    """
    _check(source, work, pool_SB)
    num_slots, row_bytes = pool_SB.shape
    if len(work.experts_W) == 0 or pool_SB.numel() == 0:
        return
    page_gather_kernel[(min(COPY_CTAS, machine(pool_SB.device)[1]),)](
        source.addresses_E,
        work.experts_W,
        work.slots_W,
        work.count_1,
        pool_SB.view(torch.int64),
        num_slots,
        row_bytes // 8,
        CHUNK=COPY_WORDS,
        num_warps=COPY_WARPS,
    )


def _check(source: HostRows, work: Work, pool_SB: Tensor) -> None:
    check_tensor("pool_SB", pool_SB, (None, None), (torch.uint8,))
    check_addresses(source)
    check_tensor("experts_W", work.experts_W, (None,), (torch.int32,))
    check_tensor("slots_W", work.slots_W, tuple(work.experts_W.shape), (torch.int32,))
    check_tensor("count_1", work.count_1, (1,), (torch.int32,))
    operands = {"pool_SB": pool_SB, "experts_W": work.experts_W, "slots_W": work.slots_W, "count_1": work.count_1}
    check_contiguous(**operands)
    check_one_device(addresses_E=source.addresses_E, **operands)
    row_bytes = pool_SB.shape[1]
    require(row_bytes < 2**31, f"a slot has {row_bytes} bytes; fewer than 2^31 are supported")
    aligned = pool_SB.data_ptr() % ROW_ALIGNMENT == row_bytes % ROW_ALIGNMENT == 0
    require(aligned, f"the slots do not begin on {ROW_ALIGNMENT} bytes")
    fits = source.row_bytes in (None, row_bytes)
    require(fits, f"the rows have {source.row_bytes} bytes and the slots {row_bytes}")
