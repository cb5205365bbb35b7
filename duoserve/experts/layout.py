"""The bytes of one packed expert: one contiguous row, the same in the pack file, in host RAM and in a slot.

S slots, N = 2I gate and up rows interleaved, H hidden, I expert intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.kernels.weights import ExpertWeights

ROW_ALIGNMENT = 4096  # direct I/O wants the offset, the length and the address to be multiples of this
SEGMENT_ALIGNMENT = 256  # TMA wants 128, and wide CPU loads never straddle a cache line


class ExpertId(NamedTuple):
    """One routed expert of the model."""

    layer: int
    expert: int


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class ExpertLayout:
    """``[w13 | w2]`` in ``dtype``, each segment on 256 bytes, the row padded to 4096 bytes."""

    dtype: torch.dtype
    hidden: int
    intermediate: int

    @property
    def w2_offset(self) -> int:
        """Byte offset of ``w2`` in the row."""
        return round_up(2 * self.intermediate * self.hidden * self.dtype.itemsize, SEGMENT_ALIGNMENT)

    @property
    def payload_bytes(self) -> int:
        """Bytes of a row before padding."""
        return self.w2_offset + self.hidden * self.intermediate * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of a row, padding included."""
        return round_up(self.payload_bytes, ROW_ALIGNMENT)

    def weights(self, rows_SB: Tensor) -> ExpertWeights:
        """Views of uint8 rows [S, slot_bytes] (contiguous, 4096-aligned) as the kernels read them."""
        typed = rows_SB.view(self.dtype)
        stride, base = typed.stride(0), typed.storage_offset()
        two_i, hidden, inter = 2 * self.intermediate, self.hidden, self.intermediate
        w2_start = base + self.w2_offset // self.dtype.itemsize
        return ExpertWeights(
            w13_SNH=typed.as_strided((len(typed), two_i, hidden), (stride, hidden, 1), base),
            w2_SHI=typed.as_strided((len(typed), hidden, inter), (stride, inter, 1), w2_start),
        )
