"""The bytes of one packed expert: one contiguous row, the same in the pack file, in host RAM and in a slot.

S slots, N = 2I gate and up rows interleaved, H hidden, I expert intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.kernels.weights import INT4_GROUPS, SEGMENT_ALIGNMENT, ExpertFormat, ExpertWeights, QuantizedLayout

ROW_ALIGNMENT = 4096  # direct I/O wants the offset, the length and the address to be multiples of this


class ExpertId(NamedTuple):
    """One routed expert of the model."""

    layer: int
    expert: int

    def __str__(self) -> str:
        """What errors call it: "expert 3/5" is the sixth of layer 3."""
        return f"expert {self.layer}/{self.expert}"


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Quantized(NamedTuple):
    """How experts are quantized in a slot; the fields behind ``format`` are for INT4 only: see QuantizedLayout."""

    format: ExpertFormat
    group: int = 0
    scale_dtype: torch.dtype = torch.float16
    ordered: bool = False

    def __str__(self) -> str:
        if self.format is not ExpertFormat.INT4:
            return str(self.format.value)
        scales = str(self.scale_dtype).removeprefix("torch.")
        return f"int4-{self.group}-{scales}{'-ordered' if self.ordered else ''}"


Stored = torch.dtype | Quantized
# What weights that are no codes may be, by torch's names: in a checkpoint, in a pack, in a slot.
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
_QUANTIZED = [
    *(Quantized(form) for form in (ExpertFormat.BF12, ExpertFormat.INT8, ExpertFormat.FP8, ExpertFormat.MXFP4)),
    *(
        Quantized(ExpertFormat.INT4, *details)
        for details in product(INT4_GROUPS, (torch.float16, torch.bfloat16), (False, True))
    ),
]
# What the weights of a row may be, by the names that packs have for it.
FORMS: dict[str, Stored] = {**DTYPES, **{str(form): form for form in _QUANTIZED}}


@dataclass(frozen=True)
class ExpertLayout:
    """``[w13 | w2]`` in the dtype ``stored``, each segment on 256 bytes, the row padded to 4096 bytes.

    Where ``stored`` is Quantized, the segments are those of QuantizedLayout; KernelError for sizes that it cannot have.
    """

    stored: Stored
    hidden: int
    intermediate: int

    @property
    def name(self) -> str:
        """What the weights are, as FORMS has it: "bfloat16", "int4-128-float16"."""
        return str(self.stored).removeprefix("torch.")

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The byte at which each segment starts, and how many bytes it has."""
        if isinstance(self.stored, Quantized):
            return self._quantized(self.stored).segments
        nbytes = self.hidden * self.intermediate * self.stored.itemsize
        return [(0, 2 * nbytes), (round_up(2 * nbytes, SEGMENT_ALIGNMENT), nbytes)]

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """The bytes of a row that are in no segment, from the first to before the second."""
        starts = [start for start, _ in self.segments[1:]]
        ends = [start + nbytes for start, nbytes in self.segments]
        return list(zip(ends, [*starts, self.slot_bytes], strict=True))

    @property
    def payload_bytes(self) -> int:
        """Bytes of a row before padding."""
        return sum(self.segments[-1])

    @property
    def slot_bytes(self) -> int:
        """Bytes of a row, padding included."""
        return round_up(self.payload_bytes, ROW_ALIGNMENT)

    def weights(self, rows_SB: Tensor) -> ExpertWeights:
        """Views of uint8 rows [S, slot_bytes] (contiguous, 4096-aligned) as the kernels read them."""
        if isinstance(self.stored, Quantized):
            return self._quantized(self.stored).weights(rows_SB)
        typed = rows_SB.view(self.stored)
        stride, base = typed.stride(0), typed.storage_offset()
        two_i, hidden, inter = 2 * self.intermediate, self.hidden, self.intermediate
        w2_start = base + self.segments[1][0] // self.stored.itemsize
        return ExpertWeights(
            w13_SNH=typed.as_strided((len(typed), two_i, hidden), (stride, hidden, 1), base),
            w2_SHI=typed.as_strided((len(typed), hidden, inter), (stride, inter, 1), w2_start),
        )

    def _quantized(self, stored: Quantized) -> QuantizedLayout:
        form, group, scale_dtype, ordered = stored
        return QuantizedLayout(form, self.hidden, self.intermediate, group, scale_dtype, ordered)
