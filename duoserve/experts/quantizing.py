"""Experts in floats made int8 or int4, each scale the one of several that leaves the smallest error; or made BF12.

NumPy's loops, which stay on their thread. A block of weights is so large that two threads of Python share them, and so
small that what is made of it stays in a core's cache.
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
from duoserve.experts.formats.bf12 import encode
from duoserve.experts.formats.codes import Codes, RowsAsTheyAre, TensorRows
from duoserve.experts.formats.scratch import Scratch, odd_lines
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
BLOCK = 1 << 17  # weights that are searched at a time
SEARCHERS = 2  # experts that are: more threads would mostly wait for each other's turn in Python


class QuantizingStore(ExpertStore):
    """Rows of ``source``, which are in floats, quantized when they are read. ``source`` stays the caller's.

    Its errors are ``source``'s, and CopyError for weights that are no finite numbers. Thread-safe.
    """

    def __init__(self, source: ExpertReader, stored: Quantized) -> None:
        self.layout = ExpertLayout(stored, source.layout.hidden, source.layout.intermediate)
        self._source = source
        self._stored = stored
        self._lock = threading.Lock()
        self._searching = threading.Semaphore(SEARCHERS)
        self._squares = np.zeros(2)

    @property
    def weight_error(self) -> float:
        """Root mean square of all weights' errors so far, as a share of that of the weights; 0 before the first."""
        with self._lock:
            error, weight = self._squares
        return float((error / weight) ** 0.5) if weight else 0.0

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """As in ExpertStore."""
        weights, squares_2, scratch = self.layout.weights(row_B[None]), np.zeros(2), Scratch()
        for w_ND, first, name in self._floats(expert):
            matrix = weights.w2 if name == "down" else weights.w13
            try:
                with self._searching:
                    squares_2 += _fill(matrix, slice(first, first + len(w_ND)), w_ND, self._stored, scratch)
            except CopyError as error:
                raise CopyError(f"expert {expert.expert} of layer {expert.layer}: {error}") from error
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

    data_NB: NDArray[np.generic]
    scales_NG: Floats
    zeros_NG: Floats | None
    squares_2: np.ndarray


def quantized(w_ND: Tensor, stored: Quantized) -> Codes:
    """A matrix of floats as INT8 or INT4 codes, with the scales that leave the least squared error."""
    num_rows, inner = w_ND.shape
    group, is_int4 = stored.group or inner, stored.format is ExpertFormat.INT4
    matrix = Packed(
        torch.empty(1, num_rows, inner // 2 if is_int4 else inner, dtype=torch.uint8 if is_int4 else torch.int8),
        torch.empty(1, inner // group, num_rows, dtype=stored.scale_dtype if is_int4 else torch.float32),
        torch.empty(1, inner // group, num_rows, dtype=torch.uint8) if is_int4 else None,
        inner,
        stored.format,
        group,
        interleaved=False,
    )
    _fill(matrix, slice(0, num_rows), w_ND, stored, Scratch())
    assert matrix.scales_SGN is not None
    zeros_GN = None if matrix.zeros_SGN is None else matrix.zeros_SGN[0]
    return Codes(stored.format, group, RowsAsTheyAre(TensorRows(matrix.data_SNB[0])), matrix.scales_SGN[0], zeros_GN)


def _fill(matrix: Packed, rows: slice, w_ND: Tensor, stored: Quantized, scratch: Scratch) -> np.ndarray:
    """Quantizes ``rows`` of the one slot; the squares of _Made. CopyError for weights that are no finite numbers."""
    search, squares_2 = SEARCHES[stored.format], np.zeros(2)
    step = max(1, BLOCK // w_ND.shape[1])
    for start in range(0, len(w_ND), step):
        floats_ND = w_ND[start : start + step]
        with np.errstate(all="ignore"):  # by a scale of 0
            made = search(floats_ND, stored, scratch)
        _write(matrix, slice(rows.start + start, rows.start + start + len(floats_ND)), made)
        squares_2 += made.squares_2
    return squares_2


def _write(matrix: Packed, rows: slice, made: _Made) -> None:
    np.copyto(matrix.data_SNB[0, rows].numpy(), made.data_NB)
    assert matrix.scales_SGN is not None
    matrix.scales_SGN[0, :, rows] = torch.from_numpy(made.scales_NG).T
    if matrix.zeros_SGN is not None and made.zeros_NG is not None:
        matrix.zeros_SGN[0, :, rows] = torch.from_numpy(made.zeros_NG).T


def _int8(w_ND: Tensor, stored: Quantized, scratch: Scratch) -> _Made:
    """All rows are brought to a largest weight of 1: then a span is one number for all of them, not one for each."""
    ones_ND, steps_ND, codes_ND = (scratch.array(name, w_ND.shape, np.float32) for name in ("ones", "steps", "codes"))
    _convert(w_ND, ones_ND)
    largest_N = np.abs(ones_ND, out=steps_ND).max(1)
    _require_finite(largest_N)
    np.divide(ones_ND, np.where(largest_N == 0, 1, largest_N)[:, None], out=ones_ND)
    spans_N, scales_N, errors_N = np.zeros_like(largest_N), np.zeros_like(largest_N), np.full_like(largest_N, np.inf)
    for span in INT8_SPANS:
        scale_N = largest_N * np.float32(span) / 127
        np.multiply(ones_ND, np.float32(127 / span), out=steps_ND)
        np.clip(np.rint(steps_ND, out=codes_ND), *INT8_CODES, out=codes_ND)
        np.subtract(steps_ND, codes_ND, out=codes_ND)
        error_N = np.einsum("nd,nd->n", codes_ND, codes_ND) * np.float32((span / 127) ** 2)
        better = (error_N < errors_N) & (scale_N > 0)
        for best, new in ((errors_N, error_N), (scales_N, scale_N), (spans_N, np.float32(span))):
            np.copyto(best, new, where=better)
    np.multiply(ones_ND, np.where(scales_N > 0, 127 / spans_N, 0).astype(np.float32)[:, None], out=steps_ND)
    np.clip(np.rint(steps_ND, out=codes_ND), *INT8_CODES, out=codes_ND)
    data_ND = scratch.array("data", w_ND.shape, np.int8)
    np.copyto(data_ND, codes_ND, casting="unsafe")
    weights_N = np.einsum("nd,nd->n", ones_ND, ones_ND)
    shares_2N = np.array([np.where(scales_N > 0, errors_N, weights_N), weights_N], np.float64)
    return _Made(data_ND, scales_N[:, None], None, (shares_2N * largest_N.astype(np.float64) ** 2).sum(1))


def _int4(w_ND: Tensor, stored: Quantized, scratch: Scratch) -> _Made:
    w_XP = _by_place(w_ND, stored.group, scratch)
    low_P, high_P = np.minimum(w_XP.min(0), 0), np.maximum(w_XP.max(0), 0)
    _require_finite(low_P)
    _require_finite(high_P)
    steps_XP, codes_XP = (scratch.array(name, w_XP.shape, np.float32) for name in ("steps", "codes"))
    scales_P, zeros_P, errors_P = np.zeros_like(low_P), np.zeros_like(low_P), np.full_like(low_P, np.inf)
    spans = np.array(INT4_SPANS, np.float32)
    for span, scale_P in zip(spans, _rounded((high_P - low_P) * spans[:, None] / 15, stored.scale_dtype), strict=True):
        zero_P = np.rint(-low_P * span / scale_P).clip(0, 15)
        np.divide(w_XP, scale_P, out=steps_XP)
        _nearest(steps_XP, zero_P, codes_XP)
        np.subtract(steps_XP, codes_XP, out=codes_XP)
        error_P = np.einsum("xp,xp->p", codes_XP, codes_XP) * scale_P * scale_P
        better = error_P < errors_P  # which NaN is not
        for best, new in ((errors_P, error_P), (scales_P, scale_P), (zeros_P, zero_P)):
            np.copyto(best, new, where=better)
    np.divide(w_XP, np.where(scales_P == 0, np.float32(np.inf), scales_P), out=steps_XP)
    _nearest(steps_XP, zeros_P, codes_XP)
    np.add(codes_XP, zeros_P, out=codes_XP)
    weights_P = np.einsum("xp,xp->p", w_XP, w_XP)
    squares_2 = np.array([np.where(scales_P == 0, weights_P, errors_P), weights_P], np.float64).sum(1)
    data_NB, num_rows = _two_in_a_byte(codes_XP, len(w_ND), scratch), len(w_ND)
    return _Made(data_NB, scales_P.reshape(num_rows, -1), zeros_P.reshape(num_rows, -1), squares_2)


def _bf12(w_ND: Tensor, stored: Quantized, scratch: Scratch) -> _Made:
    """No weight has an error."""
    del stored
    data_NB, scales_N = encode(w_ND.view(torch.uint16).numpy(), scratch)
    return _Made(data_NB, scales_N[:, None], None, np.zeros(2))


SEARCHES = {ExpertFormat.INT8: _int8, ExpertFormat.INT4: _int4, ExpertFormat.BF12: _bf12}


def _nearest(steps_XP: Floats, zeros_P: Floats, out_XP: Floats) -> None:
    """Whole numbers that are INT4_CODES when the zero-points are added."""
    lowest, highest = INT4_CODES
    np.rint(steps_XP, out=out_XP)
    np.maximum(out_XP, lowest - zeros_P, out=out_XP)
    np.minimum(out_XP, highest - zeros_P, out=out_XP)


def _by_place(w_ND: Tensor, group: int, scratch: Scratch) -> Floats:
    """[X, P] in float32, so that loops run over many places."""
    places = w_ND.numel() // group
    w_PX = scratch.columns("by row", (places, group)).view(np.float32)
    _convert(w_ND.reshape(places, group), w_PX)
    w_XP: Floats = scratch.array("by place", (group, places), np.float32)
    np.copyto(w_XP, w_PX.T)
    return w_XP


def _two_in_a_byte(codes_XP: Floats, num_rows: int, scratch: Scratch) -> NDArray[np.uint8]:
    """[N, D / 2]; an even element is in the low half."""
    group, places = codes_XP.shape
    bytes_XP = scratch.array("bytes", (group, odd_lines(places)), np.uint8)[:, :places]
    np.copyto(bytes_XP, codes_XP, casting="unsafe")
    pairs, low = bytes_XP[1::2], bytes_XP[0::2]
    np.multiply(pairs, np.uint8(16), pairs)
    np.bitwise_or(pairs, low, pairs)
    data_PB: NDArray[np.uint8] = scratch.array("data", (places, group // 2), np.uint8)
    np.copyto(data_PB, pairs.T)
    return data_PB.reshape(num_rows, -1)


def _require_finite(largest: Floats) -> None:
    if not np.isfinite(largest).all():
        raise CopyError("not all weights are finite numbers")


def _rounded(scales: Floats, dtype: torch.dtype) -> Floats:
    """As they will be stored. Where one is 0, its errors are NaN, and those are never better than none."""
    found: Floats = torch.from_numpy(scales).clamp(max=torch.finfo(dtype).max).to(dtype).float().numpy()
    return found


def _convert(w: Tensor, out: Floats) -> None:
    """To float32, in NumPy, which has no bfloat16: its bits are the upper half of a float32's."""
    if w.dtype == torch.bfloat16:
        bits = out.view(np.uint32)
        np.copyto(bits, w.view(torch.int16).numpy().view(np.uint16))
        np.left_shift(bits, np.uint32(16), bits)
    else:
        np.copyto(out, w.numpy())
