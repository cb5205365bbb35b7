"""Experts in floats made int8 or int4, each scale the one of several that leaves the smallest error.

N rows of a matrix, D its inner dimension, G groups of D, X elements that share a scale, P places of such in a matrix.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.errors import CopyError
from duoserve.experts.formats.codes import Codes, RowsAsTheyAre
from duoserve.experts.formats.expert_row import RowWriter, down_first
from duoserve.experts.layout import ExpertId, ExpertLayout, Quantized
from duoserve.experts.packing import ExpertReader
from duoserve.experts.pieces import Matrix
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat
from duoserve.kernels.weights import Matrix as Packed

# How much of the range of its weights a scale spans: less of it cuts off the largest, and steps finer over the others.
INT4_SPANS = tuple(1 - step / 32 for step in range(12))
INT8_SPANS = tuple(1 - step / 64 for step in range(8))
# Rows that are searched at a time: what a block of 128 takes in float32 stays in the cache.
ROWS = 128


class QuantizingStore(ExpertStore):
    """Rows of ``source``, which are in floats, quantized when they are read. ``source`` stays the caller's.

    Its errors are ``source``'s, and CopyError for weights that are no finite numbers. Thread-safe.
    """

    def __init__(self, source: ExpertReader, stored: Quantized) -> None:
        self.layout = ExpertLayout(stored, source.layout.hidden, source.layout.intermediate)
        self._source = source
        self._stored = stored
        self._lock = threading.Lock()
        self._squares = torch.zeros(2, dtype=torch.float64)

    @property
    def weight_error(self) -> float:
        """Root mean square of all weights' errors so far, as a share of that of the weights; 0 before the first."""
        with self._lock:
            error, weight = self._squares.tolist()
        return float((error / weight) ** 0.5) if weight else 0.0

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """As in ExpertStore."""
        floats_B = aligned_rows(1, self._source.layout.slot_bytes)[0]
        self._source.read(expert, floats_B)
        floats, weights = self._source.layout.weights(floats_B[None]), self.layout.weights(row_B[None])
        matrices: dict[Matrix, Tensor] = {"gate_up": floats.w13_SNH[0], "down": floats.w2_SHI[0]}
        if not all(bool(w_ND[block].isfinite().all()) for w_ND in matrices.values() for block in _blocks(w_ND)):
            raise CopyError(f"expert {expert.expert} of layer {expert.layer}: not all weights are finite numbers")
        writer = RowWriter(weights)
        for name in sorted(matrices, key=down_first):
            writer.add(name, quantized(matrices[name], self._stored))
        for start, stop in self.layout.gaps:
            row_B[start:stop].zero_()
        pairs = zip(matrices.values(), (weights.w13, weights.w2), strict=True)
        squares_2 = torch.stack([_squares(w_ND, matrix) for w_ND, matrix in pairs]).sum(0)
        with self._lock:
            self._squares += squares_2

    def close(self) -> None:
        """Nothing to release."""


def quantized(w_ND: Tensor, stored: Quantized) -> Codes:
    """A matrix of floats as INT8 or INT4 codes, with the scales that leave the least squared error."""
    search = _int8 if stored.format is ExpertFormat.INT8 else _int4
    blocks = [search(w_ND[block].float(), stored) for block in _blocks(w_ND)]
    zeros = [block.zeros_GN for block in blocks if block.zeros_GN is not None]
    return blocks[0]._replace(
        data=RowsAsTheyAre(torch.cat([block.data_NB for block in blocks])),
        scales_GN=torch.cat([block.scales_GN for block in blocks], dim=1),
        zeros_GN=torch.cat(zeros, dim=1) if zeros else None,
    )


def _int4(w_ND: Tensor, stored: Quantized) -> Codes:
    w_PX = w_ND.reshape(-1, stored.group)
    low_P1 = w_PX.amin(1, keepdim=True).clamp(max=0)
    range_P1 = w_PX.amax(1, keepdim=True).clamp(min=0) - low_P1
    best = _Trial.none(w_PX)
    for span in INT4_SPANS:
        scale_P1 = _rounded(range_P1 * span / 15, stored.scale_dtype)
        zero_P1 = (-low_P1 * span / scale_P1).round_().clamp_(0, 15)
        codes_PX = (w_PX / scale_P1).round_().add_(zero_P1).clamp_(0, 15)
        best = best.or_better(w_PX, codes_PX, scale_P1, zero_P1)
    codes_ND = best.codes_PX.view_as(w_ND).to(torch.uint8)
    return Codes(
        ExpertFormat.INT4,
        stored.group,
        data=RowsAsTheyAre(codes_ND[:, 0::2] | (codes_ND[:, 1::2] << 4)),
        scales_GN=best.scale_P1.view(len(w_ND), -1).T.to(stored.scale_dtype),
        zeros_GN=best.zero_P1.view(len(w_ND), -1).T.to(torch.uint8),
    )


def _int8(w_ND: Tensor, stored: Quantized) -> Codes:
    largest_N1 = w_ND.abs().amax(1, keepdim=True)
    best = _Trial.none(w_ND)
    for span in INT8_SPANS:
        scale_N1 = _rounded(largest_N1 * span / 127, torch.float32)
        codes_ND = (w_ND / scale_N1).round_().clamp_(-127, 127)
        best = best.or_better(w_ND, codes_ND, scale_N1, torch.zeros_like(scale_N1))
    data = RowsAsTheyAre(best.codes_PX.to(torch.int8))
    return Codes(stored.format, w_ND.shape[1], data, best.scale_P1.T)


class _Trial(NamedTuple):
    """The best codes so far of each place, and the squared error that they leave."""

    codes_PX: Tensor
    scale_P1: Tensor
    zero_P1: Tensor
    error_P1: Tensor

    @classmethod
    def none(cls, w_PX: Tensor) -> _Trial:
        """Before the first."""
        empty_P1 = w_PX.new_zeros(len(w_PX), 1)
        return cls(torch.zeros_like(w_PX), empty_P1, empty_P1, torch.full_like(empty_P1, torch.inf))

    def or_better(self, w_PX: Tensor, codes_PX: Tensor, scale_P1: Tensor, zero_P1: Tensor) -> _Trial:
        """For each place what leaves the smaller error."""
        error_P1 = torch.sub(codes_PX, zero_P1).mul_(scale_P1).sub_(w_PX).square_().sum(1, keepdim=True)
        is_better_P1 = error_P1 < self.error_P1
        pairs = zip((codes_PX, scale_P1, zero_P1, error_P1), self, strict=True)
        return _Trial(*(torch.where(is_better_P1, new, old) for new, old in pairs))


def _rounded(scale_P1: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be stored. Where it is 0, codes come out as NaN, and those are never better than none."""
    return scale_P1.clamp(max=torch.finfo(dtype).max).to(dtype).float()


def _squares(w_ND: Tensor, packed: Packed) -> Tensor:
    """The sums of squares of the error and of the weights, float64."""
    sums_2 = torch.zeros(2, dtype=torch.float64)
    for block in _blocks(w_ND):
        weights = w_ND[block].float()
        sums_2 += torch.stack([part.double().square().sum() for part in (dense(packed, 0, block) - weights, weights)])
    return sums_2


def _blocks(w_ND: Tensor) -> list[slice]:
    """Rows that are in work together: no second matrix is held in wider numbers."""
    return [slice(start, start + ROWS) for start in range(0, len(w_ND), ROWS)]
