"""From the codes of one expert's matrices to its packed row.

N rows of a matrix, D its inner dimension, B bytes of one row, G groups of D, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from duoserve.errors import CheckpointError
from duoserve.experts.formats.codes import Codes
from duoserve.experts.pieces import Matrix
from duoserve.kernels.weights import ExpertFormat, ExpertWeights
from duoserve.kernels.weights import Matrix as Packed

# Gate and up rows lie in turn.
LANES: dict[Matrix, slice] = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
ALL = slice(None)


def fill_row(weights: ExpertWeights, codes: Mapping[Matrix, Codes]) -> None:
    """Writes an expert's matrices into the one slot of ``weights``.

    The order of the down projection's features, where it has one, becomes the order of gate and up rows: what they make
    is what it takes. That of gate and up, which must be one, goes into the row.
    """
    rows_I = codes["down"].order_D
    for matrix, found in codes.items():
        target = weights.w2 if matrix == "down" else weights.w13
        own = found if matrix == "down" or rows_I is None else _with_rows(found, rows_I)
        _fill(
            target, own.in_groups_of(target.group) if own.format is ExpertFormat.INT4 else own, LANES.get(matrix, ALL)
        )
    if weights.order_SH is not None:
        weights.order_SH[0].copy_(_one_order(codes))


def _with_rows(codes: Codes, rows_N: Tensor) -> Codes:
    """Other rows; of formats whose scales are those of single rows."""
    zeros_GN = None if codes.zeros_GN is None else codes.zeros_GN[:, rows_N]
    return codes._replace(data_NB=codes.data_NB[rows_N], scales_GN=codes.scales_GN[:, rows_N], zeros_GN=zeros_GN)


def _fill(target: Packed, codes: Codes, lane: slice) -> None:
    assert target.scales_SGN is not None
    if codes.scales_GN.dtype != target.scales_SGN.dtype:
        raise CheckpointError(f"scales are {codes.scales_GN.dtype}, those of other experts {target.scales_SGN.dtype}")
    target.data_SNB[0, lane].copy_(codes.data_NB)
    scales = target.scales_SGN[0]
    (scales[lane] if codes.format is ExpertFormat.FP8 else scales[:, lane]).copy_(codes.scales_GN)
    if target.zeros_SGN is not None and codes.zeros_GN is not None:
        target.zeros_SGN[0, :, lane].copy_(codes.zeros_GN)


def _one_order(codes: Mapping[Matrix, Codes]) -> Tensor:
    gate_H, up_H = codes["gate"].order_D, codes["up"].order_D
    if gate_H is None or up_H is None or not torch.equal(gate_H, up_H):
        raise CheckpointError("gate and up have features in different orders (g_idx), and a row has room for one")
    return gate_H
