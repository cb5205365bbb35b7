"""Quantizes experts in floats to int8, int4 or BF12 when they are read.

B bytes of a row or of a part of one, N rows of a matrix, D its inner dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from duoserve.errors import CopyError
from duoserve.experts.formats.bf12 import encode
from duoserve.experts.formats.scratch import Scratch
from duoserve.experts.layout import ExpertId, ExpertLayout, Quantized
from duoserve.experts.pieces import part_places
from duoserve.experts.rows import aligned_rows
from duoserve.experts.scale_search import OP_BY_OP, ScaleSearch, Way
from duoserve.experts.store import ExpertStore
from duoserve.kernels.weights import ExpertFormat, Matrix

# Weights that are made BF12 at a time, in NumPy's loops, which stay on their thread: so many that two threads of Python
# share them, and so few that what is made of them stays in a core's cache.
BLOCK = 1 << 17
BF12_AT_A_TIME = 2  # experts: more threads would mostly wait for each other's turn in Python


class QuantizingStore(ExpertStore):
    """Rows of ``source``, which are in floats, quantized when they are read. ``source`` stays the caller's.

    ``way`` is how scales are searched for. Its errors are ``source``'s, and CopyError for weights that are no finite
    numbers. Thread-safe.
    """

    def __init__(self, source: ExpertStore, stored: Quantized, way: Way = OP_BY_OP) -> None:
        self.layout = ExpertLayout(stored, source.layout.hidden, source.layout.intermediate)
        self._source = source
        self._search = None if stored.format is ExpertFormat.BF12 else ScaleSearch(stored, way)
        self._turns = threading.Semaphore(BF12_AT_A_TIME if self._search is None else way.at_a_time)
        self._lock = threading.Lock()
        self._squares_2 = torch.zeros(2, dtype=torch.float64, device="cpu")

    @property
    def weight_error(self) -> float:
        """Root mean square of all weights' errors so far, as a share of that of the weights; 0 before the first."""
        with self._lock:
            error, weight = self._squares_2.tolist()
        return float((error / weight) ** 0.5) if weight else 0.0

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        weights, squares_2 = self.layout.weights(row_B[None]), torch.zeros(2, dtype=torch.float64, device="cpu")
        fill = (self._search or _Bf12()).fill
        with self._turns:
            for w_ND, first, name in self._floats(expert):
                matrix = weights.w2 if name == "down" else weights.w13
                try:
                    squares_2 += fill(matrix, slice(first, first + len(w_ND)), w_ND)
                except CopyError as error:
                    raise CopyError(f"{expert}: {error}") from error
        for start, stop in self.layout.gaps:
            row_B[start:stop].zero_()
        with self._lock:
            self._squares_2 += squares_2

    def close(self) -> None:
        """Nothing to release."""

    def _floats(self, expert: ExpertId) -> Iterator[tuple[Tensor, int, str]]:
        """Rows of w13 ("gate_up") and of w2 ("down"), and the number of the first; valid until the next are taken."""
        parts = self._source.parts(expert)
        buffer_B = aligned_rows(1, max(part.stop - part.start for part in parts))[0]
        for part in parts:
            part_B = buffer_B[: part.stop - part.start]
            self._source.read_part(expert, part, part_B)
            for name, (w_ND, (first, _)) in part_places(self._source.layout, part, part_B).items():
                if name in ("gate_up", "down"):
                    yield w_ND, first, name


class _Bf12:
    """Makes rows BF12, for one thread at a time."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def fill(self, matrix: Matrix, rows: slice, w_ND: Tensor) -> Tensor:
        """As in ScaleSearch, and no weight has an error. CopyError also for rows that the format has no room for."""
        assert matrix.scales_SGN is not None
        step = max(1, BLOCK // w_ND.shape[1])
        for start in range(0, len(w_ND), step):
            bits_ND = w_ND[start : start + step].view(torch.uint16).numpy()
            data_NB, scales_N = encode(bits_ND, self._scratch)
            here = slice(rows.start + start, rows.start + start + len(bits_ND))
            np.copyto(matrix.data_SNB[0, here].numpy(), data_NB)
            matrix.scales_SGN[0, 0, here] = torch.from_numpy(scales_N)
        return torch.zeros(2, dtype=torch.float64, device="cpu")
