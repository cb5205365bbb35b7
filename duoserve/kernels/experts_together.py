"""Experts of a few rows each, on a CPU that multiplies bfloat16: groups share the small ops around their products.

On the rows of one expert the call of such an op takes longer than its work.

R routed rows, J of them of one expert, C of a group of experts; P features of a product (2I or H), D its inner
dimension, H hidden, I expert intermediate. Between the two products all is transposed: rows are columns there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.matmul import LEFT_ROWS, Products, streams_left
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.routed_rows import RoutePlan
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix

# Products have whole tiles of rows: the library makes code for each number of rows, which takes longer than a product.
TILE = 16
# With this many rows a group's results between the products stay in a core's cache.
GROUP_ROWS = 256
# Columns of the buffers. The library's code depends on them too, so all have the same, an odd number of cache lines.
WIDTH = GROUP_ROWS + 2 * TILE


class Member(NamedTuple):
    """An expert of a group: its slot, its sorted rows, and the first of its columns in the buffers."""

    slot: int
    start: int
    stop: int
    column: int

    @property
    def columns(self) -> slice:
        """Its columns, in whole tiles. The last may overlap the next expert's columns, which are computed after it."""
        num_rows = self.stop - self.start
        return slice(self.column, self.column + -(-num_rows // TILE) * TILE)


def may_share(weights: ExpertWeights, x_TH: Tensor) -> bool:
    """Whether experts of a few rows can be computed in groups here."""
    of_one_dtype = weights.format is ExpertFormat.BF12 or weights.w13_SNH.dtype == x_TH.dtype
    return of_one_dtype and weights.products is Products.FASTEST and streams_left(x_TH)


def shares(rows: tuple[int, int]) -> bool:
    """Whether an expert of these sorted rows joins a group: of one row, or of many, products are faster otherwise."""
    start, stop = rows
    return 1 < stop - start <= LEFT_ROWS


def experts_together(
    x_TH: Tensor, weights: ExpertWeights, plan: RoutePlan, pairs: Sequence[tuple[int, int]], y_RH: Tensor
) -> None:
    """``moe_up`` and ``moe_down`` of the (expert, slot) ``pairs``, for each of which ``shares`` is true.

    An expert's bits do not depend on the other experts of its group.
    """
    for group in _groups(plan, pairs):
        x_CH = _gathered(x_TH, [plan.tokens_R[member.start : member.stop] for member in group])
        act_IC = _activated(_products(weights.w13, group, x_CH.T), group)
        y_HC = _products(weights.w2, group, act_IC)
        places_C = torch.cat([plan.places_R[member.start : member.stop] for member in group])
        y_RH.index_copy_(0, places_C, y_HC[:, : len(places_C)].T.contiguous())


def _groups(plan: RoutePlan, pairs: Sequence[tuple[int, int]]) -> Iterator[list[Member]]:
    group: list[Member] = []
    column = 0
    for expert, slot in pairs:
        start, stop = plan.rows(expert)
        if column + stop - start > GROUP_ROWS:
            yield group
            group, column = [], 0
        group.append(Member(slot, start, stop, column))
        column += stop - start
    if group:
        yield group


def _gathered(x_TH: Tensor, tokens: list[Tensor]) -> Tensor:
    """The rows of these tokens, and zeros behind them to fill the last tile."""
    tokens_C = torch.cat(tokens)
    x_CH = x_TH.new_empty(len(tokens_C) + TILE, x_TH.shape[1])
    torch.index_select(x_TH, 0, tokens_C, out=x_CH[: len(tokens_C)])
    x_CH[len(tokens_C) :] = 0
    return x_CH


def _products(matrix: Matrix, group: Sequence[Member], x_DC: Tensor) -> Tensor:
    """``w x`` of each expert, in its columns."""
    num_features = matrix.data_SNB.shape[1]
    # Weights that have to be unpacked are multiplied a block at a time, while they are in the caches.
    blocks = [slice(num_features)] if matrix.format is ExpertFormat.FLOAT else matrix.blocks
    out_PC = x_DC.new_empty(num_features, WIDTH)
    for member in group:
        for block in blocks:
            torch.mm(dense(matrix, member.slot, block), x_DC[:, member.columns], out=out_PC[block, member.columns])
    return out_PC


def _activated(up_PC: Tensor, group: Sequence[Member]) -> Tensor:
    """SwiGLU of all filled columns, including the rest of the last tile.

    PyTorch's exponential may have other bits in the last elements of a tensor, but silu rounded to bfloat16 does not.
    """
    act_IC = up_PC.new_empty(len(up_PC) // 2, WIDTH)
    filled = slice(group[-1].columns.stop)
    gate_IC, up_IC = up_PC[0::2, filled], up_PC[1::2, filled]
    torch.mul(F.silu(gate_IC.contiguous(), inplace=True), up_IC, out=act_IC[:, filled])
    return act_IC
