"""Writes an expert's packed row from the codes of its matrices.

N rows of a matrix, D its inner dimension, B bytes of one row, G groups of D, H hidden, I expert intermediate.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from duoserve.errors import CheckpointError
from duoserve.experts.formats.codes import Codes
from duoserve.experts.formats.scratch import Scratch
from duoserve.experts.pieces import MatrixName
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix

# Gate and up rows take turns.
LANES: dict[MatrixName, slice] = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
ALL = slice(None)


class RowWriter:
    """Writes an expert's matrices into the one slot of ``weights``, one after another; the down projection comes first.

    If the down projection has an order of features, it becomes the order of gate and up rows, whose outputs these are.
    The order of gate and up, which must be the same for both, goes into the row.
    """

    def __init__(self, weights: ExpertWeights, scratch: Scratch) -> None:
        self._weights = weights
        self._scratch = scratch
        self._orders: dict[MatrixName, Tensor | None] = {}

    def add(self, matrix: MatrixName, codes: Codes) -> None:
        """Writes a matrix; raises CheckpointError if its scales have another dtype than the row's."""
        rows_I = None if matrix == "down" else self._orders["down"]
        self._orders[matrix] = codes.order_D
        target = self._weights.w2 if matrix == "down" else self._weights.w13
        if codes.format is ExpertFormat.INT4:
            codes = codes.in_groups_of(target.group)
        _fill(target, codes, LANES.get(matrix, ALL), rows_I, self._scratch)

    def finish(self) -> None:
        """Writes the order, after all matrices; raises CheckpointError if gate and up do not have the same order."""
        if self._weights.order_SH is None:
            return
        gate_H, up_H = self._orders["gate"], self._orders["up"]
        if gate_H is None or up_H is None or not torch.equal(gate_H, up_H):
            raise CheckpointError("gate and up have features in different orders (g_idx), and a row has room for one")
        self._weights.order_SH[0].copy_(gate_H)


def down_first(matrix: MatrixName) -> bool:
    """A sort key that brings matrices into the order in which RowWriter takes them."""
    return matrix != "down"


def _fill(target: Matrix, codes: Codes, lane: slice, rows_N: Tensor | None, scratch: Scratch) -> None:
    """Writes row ``rows_N[n]``, or n, of the codes to row n. With ``rows_N``, each row must have scales of its own."""
    assert target.scales_SGN is not None
    if codes.scales_GN.dtype != target.scales_SGN.dtype:
        raise CheckpointError(f"scales are {codes.scales_GN.dtype}, those of other experts {target.scales_SGN.dtype}")
    codes.data.write(target.data_SNB[0, lane], scratch, rows_N)
    scales, from_scales = _bits(target.scales_SGN[0]), _bits(codes.scales_GN)
    rows = ALL if rows_N is None else rows_N.numpy()
    if codes.format is ExpertFormat.FP8:
        scales[lane] = from_scales
    else:
        scales[:, lane] = from_scales[:, rows]
    if target.zeros_SGN is not None and codes.zeros_GN is not None:
        target.zeros_SGN[0].numpy()[:, lane] = codes.zeros_GN.numpy()[:, rows]


def _bits(scales: Tensor) -> np.ndarray:
    """The scales as an array, bfloat16 as int16. NumPy's loops stay on their thread; packing has threads of its own."""
    return scales.view(torch.int16).numpy() if scales.itemsize == torch.int16.itemsize else scales.numpy()
