"""The weights of the experts in the slots, as the kernels read them, and the formats that they may have.

S slots, N rows of a matrix (2I or H), D its inner dimension (H or I), G groups of D, H hidden, I expert intermediate.

An expert is one row of bytes ``[w13 | s13 | w2 | s2 | order]``, each segment on 256 bytes. ``w`` is [N, D],
D-contiguous; the rows of w13 are gate and up rows in turn (gate0, up0, gate1, up1, ...). ``s`` is what decodes it:

======  ==================================  =====================================================================
format  an element of w                     s, and the weight that n, d stands for
======  ==================================  =====================================================================
FLOAT   float32, float16 or bfloat16        nothing; the element
INT8    int8                                float32 [1, N]; ``q * s[n]``
INT4    4 bits; an even d is in the low     float16 or bfloat16 scales [G, N], then uint8 zero-points 0..16 [G, N],
        half of byte d // 2                 in groups of 32, 64 or 128 of D; ``(q - z[d // g, n]) * s[d // g, n]``
FP8     e4m3 (no infinities, 0x7f is NaN)   float32 [blocks of N, blocks of D] of 128 x 128, DeepSeek-V3's; gate and
                                            up have blocks of their own, so w13's block rows alternate as its rows do
MXFP4   e2m1, packed as INT4                uint8 e8m0 [G, N] in groups of 32, OCP MX 1.0; ``q * 2^(s - 127)``, 255 NaN
BF12    1.5 bytes, and a few of a row       float32 [1, N], powers of two; ``bf12.py`` has the bytes of a row, which
        again: bfloat16 without loss        stand for bfloat16 weights bit by bit
======  ==================================  =====================================================================

Scales lie group by group, with N contiguous, so that a tile of rows reads them with wide loads. ``order`` is only there
if INT4 was quantized in another order of features: int32 [H], column d of w13 goes with feature order[d].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.kernels.bf12 import Bf12Rows, row_bytes
from duoserve.kernels.checks import require
from duoserve.kernels.int4_codes import Int4Codes, codes_by_byte
from duoserve.kernels.matmul import WIDEN_ELEMENTS, Products, power_of_two

Unpack = Callable[[Bf12Rows], Tensor]

SEGMENT_ALIGNMENT = 256  # TMA wants 128, and wide CPU loads never straddle a cache line
FP8_BLOCK = 128
MXFP4_GROUP = 32
INT4_GROUPS = (32, 64, 128)
BF12_MULTIPLE, BF12_MOST = 4, 1 << 15  # of columns, so that escapes lie on two bytes, and int16 can name each column


class ExpertFormat(Enum):
    """How an expert's matrices are stored; the table above says what the bytes mean."""

    FLOAT = "float"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"
    MXFP4 = "mxfp4"
    BF12 = "bf12"

    @property
    def packs_two(self) -> bool:
        """Whether a byte holds two elements."""
        return self in (ExpertFormat.INT4, ExpertFormat.MXFP4)

    def row_width(self, inner: int) -> int:
        """Elements of storage that a row of ``inner`` weights has."""
        if self is ExpertFormat.BF12:
            return row_bytes(inner)
        return inner // 2 if self.packs_two else inner


class Matrix(NamedTuple):
    """One of the two matrices in all slots, with what decodes it. ``inner`` is D, however many bytes a row has."""

    data_SNB: Tensor
    scales_SGN: Tensor | None
    zeros_SGN: Tensor | None
    inner: int
    format: ExpertFormat
    group: int
    interleaved: bool
    order_SD: Tensor | None = None
    products: Products = Products.FASTEST
    unpack: Unpack = Bf12Rows.dense
    int4_codes: Int4Codes = codes_by_byte

    @property
    def parts(self) -> list[Tensor]:
        """The weights and, where the format has them, their scales and zero-points."""
        return [part for part in (self.data_SNB, self.scales_SGN, self.zeros_SGN) if part is not None]

    @property
    def blocks(self) -> list[slice]:
        """The rows that a CPU unpacks at a time: a product finds them in the caches."""
        num_rows, step = self.data_SNB.shape[1], power_of_two(WIDEN_ELEMENTS // self.inner)
        return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]

    def words_and_zeros(self, slot: int, rows: slice) -> tuple[Tensor, Tensor]:
        """What Int4Codes takes of some rows in ``slot``; INT4 only."""
        assert self.zeros_SGN is not None
        return self.data_SNB[slot, rows].view(torch.int32), self.zeros_SGN[slot, :, rows].T


@dataclass(frozen=True)
class ExpertWeights:
    """Views over the slot pool, addressed by slot.

    ``w13_SNH`` is [S, 2I, H] with gate and up rows interleaved (gate0, up0, gate1, up1, ...); ``w2_SHI`` is
    [S, H, I]. Both are contiguous in their last dimension; the slot stride is the padded size of an expert. Formats
    other than FLOAT hold uint8 (INT8: int8) there, [S, N, D / 2] where a byte holds two, [S, N, B] in BF12, and beside
    them their scales ``s13``, ``s2`` ([S, G, N] or [S, blocks, blocks]) and zero-points ``z13``, ``z2``; ``group`` is
    the size of their groups. ``order_SH``, if given, says which feature each column of w13 goes with. ``products`` says
    how a CPU multiplies them, ``unpack`` how it converts BF12 to bfloat16, and ``int4_codes`` how it unpacks int4.
    """

    w13_SNH: Tensor
    w2_SHI: Tensor
    format: ExpertFormat = ExpertFormat.FLOAT
    group: int = 0
    s13: Tensor | None = None
    s2: Tensor | None = None
    z13: Tensor | None = None
    z2: Tensor | None = None
    order_SH: Tensor | None = None
    products: Products = Products.FASTEST
    unpack: Unpack = Bf12Rows.dense
    int4_codes: Int4Codes = codes_by_byte

    @property
    def w13(self) -> Matrix:
        """The up projection."""
        matrix = self._matrix(self.w13_SNH, self.s13, self.z13, self.w2_SHI.shape[1], interleaved=True)
        return matrix._replace(order_SD=self.order_SH)

    @property
    def w2(self) -> Matrix:
        """The down projection."""
        return self._matrix(self.w2_SHI, self.s2, self.z2, self.w13_SNH.shape[1] // 2, interleaved=False)

    def _matrix(
        self, w: Tensor, scales: Tensor | None, zeros: Tensor | None, features: int, *, interleaved: bool
    ) -> Matrix:
        """``features`` is D by the shape of the other matrix, as the length of a BF12 row does not say it."""
        stored = w.shape[2] * (2 if self.format.packs_two else 1)
        inner = features if self.format is ExpertFormat.BF12 else stored
        return Matrix(
            w,
            scales,
            zeros,
            inner,
            self.format,
            self.group,
            interleaved,
            products=self.products,
            unpack=self.unpack,
            int4_codes=self.int4_codes,
        )


class ClampedUp(NamedTuple):
    """The formula of gpt-oss's experts instead of SwiGLU: ``(up + 1) * gate * sigmoid(alpha * gate)``.

    Before that ``bias_EN`` [E, 2I], gate and up in turn, is added to the products; then the gate is cut off above
    ``limit``, and up at ``limit`` on both sides. Source: OpenAI (2025), gpt-oss model card.
    """

    bias_EN: Tensor
    alpha: float
    limit: float


@dataclass(frozen=True)
class QuantizedLayout:
    """Where the segments of a quantized expert lie in its row. Raises KernelError for shapes the format cannot have."""

    format: ExpertFormat
    hidden: int
    intermediate: int
    group: int = 0  # INT4 only
    scale_dtype: torch.dtype = torch.float16  # INT4 only
    ordered: bool = False  # INT4 only: with the order of its features

    def __post_init__(self) -> None:
        require(self.format is not ExpertFormat.FLOAT, "FLOAT experts have no quantized layout")
        if self.format is ExpertFormat.INT4:
            require(self.group in INT4_GROUPS, f"int4 groups of {self.group}; {INT4_GROUPS} are supported")
            half = (torch.float16, torch.bfloat16)
            require(self.scale_dtype in half, f"int4 scales are float16 or bfloat16, not {self.scale_dtype}")
        require(self.format is ExpertFormat.INT4 or not self.ordered, f"{self.format.value} has no order of features")
        for name, inner in (("hidden", self.hidden), ("intermediate", self.intermediate)):
            multiples = {
                ExpertFormat.INT4: self.group,
                ExpertFormat.MXFP4: MXFP4_GROUP,
                ExpertFormat.BF12: BF12_MULTIPLE,
            }
            whole = multiples.get(self.format, 1)
            require(inner % whole == 0, f"{name} is {inner}; {self.format.value} takes multiples of {whole}")
        fits = self.format is not ExpertFormat.BF12 or max(self.hidden, self.intermediate) <= BF12_MOST
        require(fits, f"an expert of {self.hidden} x {self.intermediate}; bf12 takes up to {BF12_MOST} columns")

    @property
    def slot_bytes(self) -> int:
        """Bytes of a row, each segment padded."""
        return sum(_padded(size) for size in self._sizes())

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The byte at which each segment starts, and its number of bytes."""
        sizes = self._sizes()
        return [(sum(map(_padded, sizes[:i])), size) for i, size in enumerate(sizes)]

    def weights(self, rows_SB: Tensor) -> ExpertWeights:
        """Views, as the kernels read them, of uint8 rows [S, at least slot_bytes], contiguous and on 256 bytes."""
        starts = [start for start, _ in self.segments]
        two_i, hidden, inter = 2 * self.intermediate, self.hidden, self.intermediate
        stored = torch.int8 if self.format is ExpertFormat.INT8 else torch.uint8
        s13, z13 = self._scales_and_zeros(rows_SB, starts[1], *self._matrices[0])
        s2, z2 = self._scales_and_zeros(rows_SB, starts[3], *self._matrices[1])
        return ExpertWeights(
            w13_SNH=_view(rows_SB, starts[0], stored, (two_i, self.format.row_width(hidden))),
            w2_SHI=_view(rows_SB, starts[2], stored, (hidden, self.format.row_width(inter))),
            format=self.format,
            group=MXFP4_GROUP if self.format is ExpertFormat.MXFP4 else self.group,
            s13=s13,
            s2=s2,
            z13=z13,
            z2=z2,
            order_SH=_view(rows_SB, starts[4], torch.int32, (1, hidden))[:, 0] if self.ordered else None,
        )

    @property
    def _matrices(self) -> tuple[tuple[int, int, bool], ...]:
        """(rows, inner dimension, interleaved) of w13 and w2."""
        return (2 * self.intermediate, self.hidden, True), (self.hidden, self.intermediate, False)

    @property
    def _scale_dtype(self) -> torch.dtype:
        kinds = {ExpertFormat.INT4: self.scale_dtype, ExpertFormat.MXFP4: torch.uint8}
        return kinds.get(self.format, torch.float32)

    def _sizes(self) -> list[int]:
        """Bytes of w13, s13, w2, s2 and, where there is one, the order."""
        sizes = []
        for rows, inner, interleaved in self._matrices:
            groups, width = self._scale_shape(rows, inner, interleaved)
            zero_bytes = 1 if self.format is ExpertFormat.INT4 else 0
            scaling = groups * width * (self._scale_dtype.itemsize + zero_bytes)
            sizes += [rows * self.format.row_width(inner), scaling]
        return [*sizes, self.hidden * torch.int32.itemsize] if self.ordered else sizes

    def _scale_shape(self, rows: int, inner: int, interleaved: bool) -> tuple[int, int]:
        if self.format in (ExpertFormat.INT8, ExpertFormat.BF12):
            return 1, rows
        if self.format is ExpertFormat.FP8:
            block_rows = 2 * _ceil(rows // 2, FP8_BLOCK) if interleaved else _ceil(rows, FP8_BLOCK)
            return block_rows, _ceil(inner, FP8_BLOCK)
        return inner // (self.group if self.format is ExpertFormat.INT4 else MXFP4_GROUP), rows

    def _scales_and_zeros(
        self, rows_SB: Tensor, start: int, rows: int, inner: int, interleaved: bool
    ) -> tuple[Tensor, Tensor | None]:
        shape = self._scale_shape(rows, inner, interleaved)
        scales = _view(rows_SB, start, self._scale_dtype, shape)
        if self.format is not ExpertFormat.INT4:
            return scales, None
        after = start + shape[0] * shape[1] * self._scale_dtype.itemsize
        return scales, _view(rows_SB, after, torch.uint8, shape)


def _view(rows_SB: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """[S, *shape] of ``dtype`` at byte ``start`` of every row."""
    size = shape[0] * shape[1] * dtype.itemsize
    return rows_SB[:, start : start + size].view(dtype).view(len(rows_SB), *shape)


def _ceil(n: int, d: int) -> int:
    return -(-n // d)


def _padded(size: int) -> int:
    return _ceil(size, SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
