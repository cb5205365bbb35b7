"""Experts in floats made int8 or int4, each scale the one of several that leaves the smallest error.

NumPy's loops, which stay on their thread; one expert at a time is searched. Several threads of Python would mostly wait
for each other's turn between operations as short as these, and torch's own threads for each other.
N rows of a matrix, D its inner dimension, G groups of D, X elements that share a scale, P places of such in a matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duoserve.errors import CopyError
from duoserve.experts.formats.codes import Codes, RowsAsTheyAre
from duoserve.experts.layout import ExpertId, ExpertLayout, Quantized
from duoserve.experts.packing import ExpertReader
from duoserve.experts.pieces import part_places
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore
from duoserve.kernels.weights import ExpertFormat
from duoserve.kernels.weights import Matrix as Packed

Floats = NDArray[np.float32]

# How much of the range of its weights a scale spans: less of it cuts off the largest, and steps finer over the others.
INT4_SPANS = tuple(1 - step / 32 for step in range(12))
INT8_SPANS = tuple(1 - step / 64 for step in range(8))
INT4_CODES, INT8_CODES = (0, 15), (-127, 127)
BLOCK = 1 << 16  # weights that are searched at a time: what is made of them stays in a core's cache


class QuantizingStore(ExpertStore):
    """Rows of ``source``, which are in floats, quantized when they are read. ``source`` stays the caller's.

    Its errors are ``source``'s, and CopyError for weights that are no finite numbers. Thread-safe.
    """

    def __init__(self, source: ExpertReader, stored: Quantized) -> None:
        self.layout = ExpertLayout(stored, source.layout.hidden, source.layout.intermediate)
        self._source = source
        self._stored = stored
        self._lock = threading.Lock()
        self._searching = threading.Lock()
        self._squares = np.zeros(2)

    @property
    def weight_error(self) -> float:
        """Root mean square of all weights' errors so far, as a share of that of the weights; 0 before the first."""
        with self._lock:
            error, weight = self._squares
        return float((error / weight) ** 0.5) if weight else 0.0

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """As in ExpertStore."""
        weights, squares_2 = self.layout.weights(row_B[None]), np.zeros(2)
        for w_ND, first, name in self._floats(expert):
            with self._searching:
                if not all(bool(np.isfinite(block_ND).all()) for block_ND in _blocks(w_ND)):
                    raise CopyError(
                        f"expert {expert.expert} of layer {expert.layer}: not all weights are finite numbers"
                    )
                made = _quantized(w_ND, self._stored)
            _write(weights.w2 if name == "down" else weights.w13, first, made)
            squares_2 += made.squares_2
        for start, stop in self.layout.gaps:
            row_B[start:stop].zero_()
        with self._lock:
            self._squares += squares_2

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


class _Made(NamedTuple):
    """Rows of a matrix as they are stored; the sums of squares of their errors and of the weights, float64."""

    data_NB: Tensor
    scales_GN: Tensor
    zeros_GN: Tensor | None
    squares_2: np.ndarray


def quantized(w_ND: Tensor, stored: Quantized) -> Codes:
    """A matrix of floats as INT8 or INT4 codes, with the scales that leave the least squared error."""
    made = _quantized(w_ND, stored)
    group = stored.group or w_ND.shape[1]
    return Codes(stored.format, group, RowsAsTheyAre(made.data_NB), made.scales_GN, made.zeros_GN)


def _quantized(w_ND: Tensor, stored: Quantized) -> _Made:
    search = _int8 if stored.format is ExpertFormat.INT8 else _int4
    with np.errstate(all="ignore"):  # by a scale of 0
        blocks = [search(block_ND, stored) for block_ND in _blocks(w_ND)]
    zeros = [block.zeros_GN for block in blocks if block.zeros_GN is not None]
    return _Made(
        torch.cat([block.data_NB for block in blocks]),
        torch.cat([block.scales_GN for block in blocks], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
        sum((block.squares_2 for block in blocks), np.zeros(2)),
    )


def _write(target: Packed, first: int, made: _Made) -> None:
    """Rows from ``first`` on of the one slot."""
    rows = slice(first, first + len(made.data_NB))
    target.data_SNB[0, rows] = made.data_NB
    assert target.scales_SGN is not None
    target.scales_SGN[0, :, rows] = made.scales_GN
    if target.zeros_SGN is not None and made.zeros_GN is not None:
        target.zeros_SGN[0, :, rows] = made.zeros_GN


def _int4(w_ND: Floats, stored: Quantized) -> _Made:
    w_XP = np.ascontiguousarray(w_ND.reshape(-1, stored.group).T)  # so that loops run over many places
    low_P = np.minimum(w_XP.min(0), 0)
    range_P = np.maximum(w_XP.max(0), 0) - low_P
    search = _Search(w_XP, INT4_CODES, axis=0)
    for span in INT4_SPANS:
        scale_P = _rounded(range_P * span / 15, stored.scale_dtype)
        search.attempt(scale_P, np.rint(-low_P * span / scale_P).clip(0, 15))
    codes_XP, num_rows = search.codes(), len(w_ND)
    bytes_P = (codes_XP[1::2] * 16 + codes_XP[0::2] + 17 * search.zeros).astype(np.uint8).T
    return _Made(
        torch.from_numpy(np.ascontiguousarray(bytes_P).reshape(num_rows, -1)),
        torch.from_numpy(search.scales.reshape(num_rows, -1)).T.to(stored.scale_dtype),
        torch.from_numpy(search.zeros.reshape(num_rows, -1)).T.to(torch.uint8),
        search.squares(),
    )


def _int8(w_ND: Floats, stored: Quantized) -> _Made:
    largest_N1 = np.abs(w_ND).max(1, keepdims=True)
    search = _Search(w_ND, INT8_CODES, axis=1)
    for span in INT8_SPANS:
        search.attempt(_rounded(largest_N1 * span / 127, torch.float32), np.zeros_like(largest_N1))
    data_ND = torch.from_numpy(search.codes().astype(np.int8))
    return _Made(data_ND, torch.from_numpy(search.scales).T, None, search.squares())


class _Search:
    """The scale and the zero-point of each place that leave the smallest squared error so far.

    Weights share them along ``axis``; where no scale was above 0, both stay 0.
    """

    def __init__(self, weights: Floats, codes: tuple[int, int], axis: int) -> None:
        self._weights, self._codes, self._axis = weights, codes, axis
        self._steps, self._nearest = np.empty_like(weights), np.empty_like(weights)
        self.scales = np.zeros_like(weights.max(axis, keepdims=axis == 1))
        self.zeros = self.scales.copy()
        self._errors = np.full_like(self.scales, np.inf)

    def attempt(self, scales: Floats, zeros: Floats) -> None:
        """Takes them where they are better."""
        self._round(scales, zeros)
        self._nearest -= self._steps
        errors = _sums_of_squares(self._nearest, self._axis).reshape(scales.shape) * scales * scales
        better = errors < self._errors  # which NaN is not
        for best, new in ((self._errors, errors), (self.scales, scales), (self.zeros, zeros)):
            np.copyto(best, new, where=better)

    def codes(self) -> Floats:
        """Whole numbers, less the zero-points, in memory that is used again."""
        self._round(np.where(self.scales == 0, np.float32(np.inf), self.scales), self.zeros)
        return self._nearest

    def squares(self) -> np.ndarray:
        """The sums of squares of the errors and of the weights."""
        weights = _sums_of_squares(self._weights, self._axis)
        errors = np.where(self.scales == 0, weights.reshape(self.scales.shape), self._errors)
        return np.array([errors.sum(dtype=np.float64), weights.sum(dtype=np.float64)])

    def _round(self, scales: Floats, zeros: Floats) -> None:
        lowest, highest = self._codes
        np.divide(self._weights, scales, out=self._steps)
        np.rint(self._steps, out=self._nearest)
        np.maximum(self._nearest, lowest - zeros, out=self._nearest)
        np.minimum(self._nearest, highest - zeros, out=self._nearest)


def _sums_of_squares(weights: Floats, axis: int) -> Floats:
    found: Floats = np.einsum("xp,xp->p" if axis == 0 else "px,px->p", weights, weights)
    return found


def _rounded(scales: Floats, dtype: torch.dtype) -> Floats:
    """As they will be stored. Where one is 0, its errors are NaN, and those are never better than none."""
    found: Floats = torch.from_numpy(scales).clamp(max=torch.finfo(dtype).max).to(dtype).float().numpy()
    return found


def _blocks(w_ND: Tensor) -> Iterator[Floats]:
    """Rows that are in work together, in float32. Each is converted alone, for torch splits what is large over threads
    of its own.
    """
    num_rows, inner = w_ND.shape
    for start in range(0, num_rows, max(1, BLOCK // inner)):
        rows_ND = w_ND[start : start + max(1, BLOCK // inner)]
        block = torch.empty(rows_ND.shape, dtype=torch.float32)
        for row_D, floats_D in zip(rows_ND, block, strict=True):
            floats_D.copy_(row_D)
        yield block.numpy()
