"""The missing experts of a case in host memory, their slots poisoned."""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.kernels import Work
from duoserve.kernels.host_rows import HostRows
from tests.kernels.common import DEVICE, POISON
from tests.kernels.experts_case import Case

PADDING = 0x11  # of the host's rows: what lies between the parts of an expert has no business in a slot


def host_row(case: Case, slot: int) -> Tensor:
    """What is in ``slot``, as a row of host memory whose padding is marked."""
    row_1B = torch.full((1, case.pool.rows_SB.shape[1]), PADDING, dtype=torch.uint8)
    row_1B = row_1B.pin_memory() if DEVICE.type == "cuda" else row_1B
    ours, theirs = case.pool.layout.weights(row_1B), case.pool.weights
    for mine, other in ((ours.w13, theirs.w13), (ours.w2, theirs.w2)):
        for part, whole in zip(mine.parts, other.parts, strict=True):
            part[0].copy_(whole[slot])
    return row_1B[0]


class Away:
    """Takes the missing experts of ``case`` out of their slots. ``full_SB``: the slots as they were and must be."""

    def __init__(self, case: Case) -> None:
        self.full_SB = case.pool.rows_SB.clone()
        self.work: Work = case.arrived
        rows: list[Tensor | None] = [None] * len(case.slots_E)
        for expert, slot in self.work.pairs():
            rows[expert] = host_row(case, slot)
            case.pool.rows_SB[slot] = POISON
        self.source = HostRows.of(rows, DEVICE)
