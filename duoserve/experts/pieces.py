"""Where one expert's matrices lie in a checkpoint: each in a tensor of its own, or in one tensor for a whole layer.

E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from duoserve.experts.layout import ExpertLayout

Matrix = Literal["gate", "up", "gate_up", "down"]


class Piece(NamedTuple):
    """One matrix of one expert: ``gate`` or ``up`` [I, H], ``gate_up`` [2I, H] (their rows in turn), ``down`` [H, I].

    It is the tensor ``name``, of ``shape``; of a tensor for all experts, its part ``entry``, and of that only the
    ``rows`` from the first number to before the second, where they are given. ``transposed``: stored [in, out].
    """

    matrix: Matrix
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


ExpertPieces = Sequence[Piece]


def places(layout: ExpertLayout, row_B: Tensor) -> dict[Matrix, Tensor]:
    """The view of a packed expert's row (uint8 [slot_bytes]) that each matrix goes to."""
    weights = layout.weights(row_B[None])
    w13_NH = weights.w13_SNH[0]
    w13_IPH = w13_NH.view(layout.intermediate, 2, layout.hidden)
    return {"gate": w13_IPH[:, 0], "up": w13_IPH[:, 1], "gate_up": w13_NH, "down": weights.w2_SHI[0]}
