"""Where one expert's matrices lie in a checkpoint: each in a tensor of its own, or in one tensor for a whole layer.

E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from duoserve.experts.layout import ROW_ALIGNMENT, ExpertLayout

MatrixName = Literal["gate", "up", "gate_up", "down"]


class MatrixPiece(NamedTuple):
    """One matrix of one expert: ``gate`` or ``up`` [I, H], ``gate_up`` [2I, H] (their rows in turn), ``down`` [H, I].

    It is the tensor ``name``, of ``shape``; of a tensor for all experts, its part ``entry``, and of that only the
    ``rows`` from the first number to before the second, where they are given. ``transposed``: stored [in, out].
    """

    matrix: MatrixName
    name: str
    shape: tuple[int, ...]
    entry: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and inner dimension of the matrix, or of the tensor's part that it is cut from."""
        num_rows, inner = self.shape[-2:]
        return (inner, num_rows) if self.transposed else (num_rows, inner)

    def cut(self, first: int, stop: int) -> MatrixPiece:
        """Only rows ``first`` to before ``stop`` of this matrix, which is not transposed."""
        start = self.rows[0] if self.rows else 0
        return self._replace(rows=(start + first, start + stop))


ExpertPieces = Sequence[MatrixPiece]


class RowPart(NamedTuple):
    """Bytes ``start`` to before ``stop`` of a packed row, both multiples of 4096."""

    start: int
    stop: int


def whole(layout: ExpertLayout) -> list[RowPart]:
    """A row in one part."""
    return [RowPart(0, layout.slot_bytes)]


def float_parts(layout: ExpertLayout, nbytes: int) -> list[RowPart]:
    """A row of floats in parts of about ``nbytes``: each has whole rows of one matrix, of w13 pairs of gate and up.

    One part, if the matrices do not begin and end on multiples of 4096 bytes.
    """
    assert isinstance(layout.stored, torch.dtype)
    if any(stop - start for start, stop in layout.gaps) or any(start % ROW_ALIGNMENT for start, _ in layout.segments):
        return whole(layout)
    parts = []
    for (start, size), row in zip(layout.segments, (2 * layout.hidden, layout.intermediate), strict=True):
        least = lcm(row * layout.stored.itemsize, ROW_ALIGNMENT)
        step = least * max(1, nbytes // least)
        parts += [RowPart(start + done, start + min(done + step, size)) for done in range(0, size, step)]
    return parts


def places(layout: ExpertLayout, row_B: Tensor) -> dict[MatrixName, Tensor]:
    """The view of a packed expert's row (uint8 [slot_bytes]) that each matrix goes to."""
    weights = layout.weights(row_B[None])
    w13_NH = weights.w13_SNH[0]
    w13_IPH = w13_NH.view(layout.intermediate, 2, layout.hidden)
    return {"gate": w13_IPH[:, 0], "up": w13_IPH[:, 1], "gate_up": w13_NH, "down": weights.w2_SHI[0]}


def part_places(layout: ExpertLayout, part: RowPart, out_B: Tensor) -> dict[MatrixName, tuple[Tensor, tuple[int, int]]]:
    """The view that rows of each matrix go to, and which rows, in a part of a row of floats and its bytes (uint8).

    The part is the row, or one of ``float_parts``. Matrices that have no rows in it are not among them.
    """
    if part == whole(layout)[0]:
        return {name: (view, (0, len(view))) for name, view in places(layout, out_B).items()}
    assert isinstance(layout.stored, torch.dtype)
    down_start, hidden, inter = layout.segments[1][0], layout.hidden, layout.intermediate
    typed, itemsize = out_B.view(layout.stored), layout.stored.itemsize
    if part.start >= down_start:
        first = (part.start - down_start) // (inter * itemsize)
        w2_NI = typed.view(-1, inter)
        return {"down": (w2_NI, (first, first + len(w2_NI)))}
    first = part.start // (2 * hidden * itemsize)
    w13_P2H = typed.view(-1, 2, hidden)
    pairs = (first, first + len(w13_P2H))
    both = (2 * pairs[0], 2 * pairs[1])
    return {
        "gate": (w13_P2H[:, 0], pairs),
        "up": (w13_P2H[:, 1], pairs),
        "gate_up": (w13_P2H.flatten(0, 1), both),
    }
