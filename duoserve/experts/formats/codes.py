"""The form in which every quantized format of a checkpoint is read: a matrix in the codes and scales of a packed row.

N rows of a matrix, D its inner dimension, B bytes of one row, G groups of D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from duoserve.experts.formats.scratch import Scratch
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat, Matrix

# About so much is read and converted at a time. If each call works on a MB or more, two Python threads run at once;
# with smaller calls each would mostly wait for the interpreter, which costs more than a core's cache saves.
TILE_BYTES = 2 << 20
LONG_ROW_BYTES = 4096  # copying a shorter row a second time costs less than a place in a list of buffers


class StoredTensor(NamedTuple):
    """The shape that a tensor of a checkpoint must have, and the dtypes that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Part(NamedTuple):
    """One of the tensors that a matrix is stored in."""

    name: str
    tensor: StoredTensor


class StoredRows(Protocol):
    """The rows of a stored tensor, which are read some at a time. Raises CheckpointError if they cannot be read."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape of the whole tensor."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some rows, contiguous, and valid until the next are asked for."""

    def copy_to(self, out_NB: Tensor) -> None:
        """Fills ``out_NB``, whose elements are bytes and whose rows are contiguous each, with the bytes of all rows."""


class RowData(Protocol):
    """The bytes [N, B] of a matrix in a packed row, which are made when they are written there."""

    @property
    def shape(self) -> tuple[int, int]:
        """N, B."""

    def write(self, out_NB: Tensor, scratch: Scratch, rows_N: Tensor | None = None) -> None:
        """Fills ``out_NB`` (each row contiguous): row n gets row ``rows_N[n]`` (int64) of the matrix, or row n.

        Intermediate results lie in ``scratch``.
        """


@dataclass(frozen=True)
class RowsAsTheyAre:
    """RowData whose bytes are stored as they are, in elements of one byte; a row may have several dimensions."""

    data: StoredRows

    @property
    def shape(self) -> tuple[int, int]:
        """N, B."""
        return self.data.shape[0], prod(self.data.shape[1:])

    def write(self, out_NB: Tensor, scratch: Scratch, rows_N: Tensor | None = None) -> None:
        """As in RowData."""
        if rows_N is None and (out_NB.is_contiguous() or self.shape[1] >= LONG_ROW_BYTES):
            self.data.copy_to(out_NB)
            return
        (num_rows, nbytes), out = self.shape, out_NB.numpy()
        places_N = None if rows_N is None else np.argsort(rows_N.numpy())
        step = max(1, TILE_BYTES // nbytes)
        for first in range(0, num_rows, step):
            rows = slice(first, min(first + step, num_rows))
            out[rows if places_N is None else places_N[rows]] = _bytes(self.data[rows], out_NB.dtype)


def _bytes(rows: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Rows of elements of one byte, for NumPy: torch would split a copy over threads, and packing has its own."""
    return rows.view(dtype).flatten(1).numpy()


class Codes(NamedTuple):
    """One matrix; the table in ``kernels/weights.py`` says what its bytes mean.

    ``group`` is in features and may be one that no kernel has; the last group may be cut short. Column d goes with
    feature ``order_D[d]`` (int64), or with feature d if that is None.
    """

    format: ExpertFormat
    group: int
    data: RowData
    scales_GN: Tensor
    zeros_GN: Tensor | None = None
    order_D: Tensor | None = None

    @property
    def inner(self) -> int:
        """D."""
        return self.data.shape[1] * (2 if self.format.packs_two else 1)

    @property
    def data_NB(self) -> Tensor:
        """The bytes [N, B], in new memory."""
        dtype = torch.int8 if self.format is ExpertFormat.INT8 else torch.uint8
        out_NB = torch.empty(self.data.shape, dtype=dtype, device="cpu")
        self.data.write(out_NB, Scratch())
        return out_NB

    def in_groups_of(self, group: int) -> Codes:
        """The same matrix in groups of ``group``, which must divide D and the present group."""
        if group == self.group:
            return self
        scales_GN, zeros_GN = (
            None if part is None else part.repeat_interleave(self.group // group, dim=0)[: self.inner // group]
            for part in (self.scales_GN, self.zeros_GN)
        )
        assert scales_GN is not None
        return self._replace(group=group, scales_GN=scales_GN, zeros_GN=zeros_GN)

    def dense(self) -> Tensor:
        """The matrix [N, D] in float32, its features in their own order."""
        codes = self.in_groups_of(gcd(self.group, self.inner)) if self.format is ExpertFormat.INT4 else self
        zeros_1GN, order_1D = (None if part is None else part[None] for part in (codes.zeros_GN, codes.order_D))
        return dense(
            Matrix(
                data_SNB=codes.data_NB[None],
                scales_SGN=codes.scales_GN[None],
                zeros_SGN=zeros_1GN,
                inner=codes.inner,
                format=codes.format,
                group=codes.group,
                interleaved=False,
                order_SD=order_1D,
            ),
            slot=0,
        )


class WeightFormat(Protocol):
    """A way to store a matrix other than in floats."""

    def parts(self, name: str, num_rows: int, inner: int) -> dict[str, Part]:
        """The tensors of the matrix [num_rows, inner], by role; its name would be ``name`` if it were not quantized.

        Its codes have the role "data".
        """

    def codes(self, data: StoredRows, parts: Mapping[str, Tensor]) -> Codes:
        """The matrix of these tensors, by their roles; raises CheckpointError for values that make no sense."""
