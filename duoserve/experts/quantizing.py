"""Experts in floats made int8 or int4, each scale the one of several that leaves the smallest error.

One expert at a time has all of torch's threads: threads of Python that each searched for its own would mostly wait for
each other's turn between operations as short as these.
N rows of a matrix, D its inner dimension, G groups of D, X elements that share a scale, P places of such in a matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
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

# How much of the range of its weights a scale spans: less of it cuts off the largest, and steps finer over the others.
INT4_SPANS = tuple(1 - step / 32 for step in range(12))
INT8_SPANS = tuple(1 - step / 64 for step in range(8))
INT4_CODES, INT8_CODES = (0, 15), (-127, 127)
BLOCK = 1 << 18  # weights that are searched at a time: what is made of them stays in the caches of two cores


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
        self._squares = torch.zeros(2, dtype=torch.float64)

    @property
    def weight_error(self) -> float:
        """Root mean square of all weights' errors so far, as a share of that of the weights; 0 before the first."""
        with self._lock:
            error, weight = self._squares.tolist()
        return float((error / weight) ** 0.5) if weight else 0.0

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """As in ExpertStore."""
        weights, squares_2 = self.layout.weights(row_B[None]), torch.zeros(2, dtype=torch.float64)
        for w_ND, first, name in self._floats(expert):
            with self._searching:
                if not all(bool(block_ND.isfinite().all()) for block_ND in _blocks(w_ND)):
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
    squares_2: Tensor


def quantized(w_ND: Tensor, stored: Quantized) -> Codes:
    """A matrix of floats as INT8 or INT4 codes, with the scales that leave the least squared error."""
    made = _quantized(w_ND, stored)
    group = stored.group or w_ND.shape[1]
    return Codes(stored.format, group, RowsAsTheyAre(made.data_NB), made.scales_GN, made.zeros_GN)


def _quantized(w_ND: Tensor, stored: Quantized) -> _Made:
    search = _int8 if stored.format is ExpertFormat.INT8 else _int4
    blocks = [search(block_ND.float(), stored) for block_ND in _blocks(w_ND)]
    zeros = [block.zeros_GN for block in blocks if block.zeros_GN is not None]
    return _Made(
        torch.cat([block.data_NB for block in blocks]),
        torch.cat([block.scales_GN for block in blocks], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
        torch.stack([block.squares_2 for block in blocks]).sum(0),
    )


def _write(target: Packed, first: int, made: _Made) -> None:
    """Rows from ``first`` on of the one slot."""
    rows = slice(first, first + len(made.data_NB))
    target.data_SNB[0, rows] = made.data_NB
    assert target.scales_SGN is not None
    target.scales_SGN[0, :, rows] = made.scales_GN
    if target.zeros_SGN is not None and made.zeros_GN is not None:
        target.zeros_SGN[0, :, rows] = made.zeros_GN


def _int4(w_ND: Tensor, stored: Quantized) -> _Made:
    w_XP = w_ND.reshape(-1, stored.group).T.contiguous()  # so that loops run over many places
    low_P = w_XP.amin(0).clamp(max=0)
    range_P = w_XP.amax(0).clamp(min=0) - low_P
    search = _Search(w_XP, INT4_CODES, axis=0)
    for span in INT4_SPANS:
        scale_P = _rounded(range_P * span / 15, stored.scale_dtype)
        search.attempt(scale_P, (-low_P * span / scale_P).round_().clamp_(0, 15))
    codes_XP, num_rows = search.codes(), len(w_ND)
    bytes_XP = torch.add(codes_XP[0::2], codes_XP[1::2], alpha=16).add_(search.zeros, alpha=17).to(torch.uint8)
    return _Made(
        bytes_XP.T.reshape(num_rows, -1),
        search.scales.view(num_rows, -1).T.to(stored.scale_dtype),
        search.zeros.view(num_rows, -1).T.to(torch.uint8),
        search.squares(),
    )


def _int8(w_ND: Tensor, stored: Quantized) -> _Made:
    largest_N1 = w_ND.abs().amax(1, keepdim=True)
    search = _Search(w_ND, INT8_CODES, axis=1)
    for span in INT8_SPANS:
        search.attempt(_rounded(largest_N1 * span / 127, torch.float32), torch.zeros_like(largest_N1))
    return _Made(search.codes().to(torch.int8), search.scales.T, None, search.squares())


class _Search:
    """The scale and the zero-point of each place that leave the smallest squared error so far.

    Weights share them along ``axis``; where no scale was above 0, both stay 0.
    """

    def __init__(self, weights: Tensor, codes: tuple[int, int], axis: int) -> None:
        self._weights, self._codes, self._axis = weights, codes, axis
        self._steps, self._nearest = torch.empty_like(weights), torch.empty_like(weights)
        self.scales = torch.zeros_like(weights.sum(axis, keepdim=axis == 1))
        self.zeros = torch.zeros_like(self.scales)
        self._errors = torch.full_like(self.scales, torch.inf)

    def attempt(self, scales: Tensor, zeros: Tensor) -> None:
        """Takes them where they are better."""
        self._round(scales, zeros)
        errors = self._nearest.sub_(self._steps).square_().sum(self._axis).view_as(scales) * scales * scales
        better = errors < self._errors  # which NaN is not
        self._errors = torch.where(better, errors, self._errors)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)

    def codes(self) -> Tensor:
        """Whole numbers, less the zero-points, in memory that is used again."""
        self._round(self.scales.where(self.scales > 0, torch.inf), self.zeros)
        return self._nearest

    def squares(self) -> Tensor:
        """The sums of squares of the errors and of the weights."""
        weights = torch.square(self._weights).sum(self._axis).view_as(self.scales)
        errors = torch.where(self.scales > 0, self._errors, weights)
        return torch.stack([part.double().sum() for part in (errors, weights)])

    def _round(self, scales: Tensor, zeros: Tensor) -> None:
        lowest, highest = self._codes
        torch.div(self._weights, scales, out=self._steps)
        torch.round(self._steps, out=self._nearest)
        torch.clamp(self._nearest, lowest - zeros, highest - zeros, out=self._nearest)


def _rounded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As they will be stored. Where one is 0, its errors are NaN, and those are never better than none."""
    return scales.clamp(max=torch.finfo(dtype).max).to(dtype).float()


def _blocks(w_ND: Tensor) -> Iterator[Tensor]:
    """Rows that are in work together: no second matrix is held in wider numbers."""
    rows = max(1, BLOCK // w_ND.shape[1])
    return (w_ND[start : start + rows] for start in range(0, len(w_ND), rows))
