"""Measures the link to a device, both for copies and for a kernel that reads the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from duoserve import kernels
from duoserve.experts.slots import SlotPool
from duoserve.kernels import HostRows, HostWork

ROUNDS = 3
MAX_ROWS = 16  # enough to find the rate of copies within a few percent, even with the smallest experts there are


class LinkRates(NamedTuple):
    """Bytes per second of experts that are copied, and of experts that a kernel reads."""

    copy: float
    zero_copy: float


def link_rates(source: HostRows, pool: SlotPool, seconds: Callable[[Callable[[], None]], float]) -> LinkRates:
    """Brings the same rows into the first slots in both ways; the slots' bytes are lost. ``seconds`` times a run."""
    rows = {expert: row_B for expert, row_B in enumerate(source.rows_E) if row_B is not None}
    pairs = list(zip(rows, range(min(MAX_ROWS, pool.num_slots)), strict=False))
    work = HostWork.of(pairs, pool.rows_SB.device)
    nbytes = len(pairs) * pool.rows_SB.shape[1]

    def copy() -> None:
        for expert, slot in pairs:
            pool.row(slot).copy_(rows[expert], non_blocking=True)

    def gather() -> None:
        kernels.page_gather(source, work, pool.rows_SB)

    return LinkRates(nbytes / seconds(copy), nbytes / seconds(gather))


def seconds_on_gpu(run: Callable[[], object]) -> float:
    """The device's time for ``run``: the best of ROUNDS, after one that compiles."""
    run()
    return min(_timed(run) for _ in range(ROUNDS))


def _timed(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3
