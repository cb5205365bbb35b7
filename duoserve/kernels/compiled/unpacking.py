"""BF12 rows and int4 codes unpacked by loops that PyTorch's compiler makes for a CPU.

N rows of a matrix, D its inner dimension, P rows of a piece; W words of a row, G groups of it, C words of a group.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from duoserve.errors import CompilerError
from duoserve.kernels.bf12 import Bf12Rows, row_bytes, signed
from duoserve.kernels.compiled.loops import CompiledLoops
from duoserve.kernels.compiled.streamed import laid_down
from duoserve.kernels.compiled.token_expert import INT4_GROUP
from duoserve.kernels.int4_codes import CODES_IN_WORD, code_dtype, codes_by_word
from duoserve.kernels.matmul import power_of_two
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix

# This many weights are unpacked at a time: what the first loop leaves for the second stays in the cores' caches.
PIECE_WEIGHTS = 1 << 19


class CompiledUnpack:
    """``Bf12Rows.dense``, compiled for pieces of rows; the rows left over are unpacked op by op."""

    def __init__(self) -> None:
        self._loops = CompiledLoops()

    def __call__(self, rows: Bf12Rows) -> Tensor:
        """As ``Bf12Rows.dense``."""
        num_rows, inner = rows.signed_ND.shape
        piece = _piece_rows(inner)
        w_ND, used_PC = rows.signed_ND.new_empty(num_rows, inner, dtype=torch.bfloat16), _used(rows, piece)
        whole = num_rows - num_rows % piece
        for first in range(0, whole, piece):
            rows_P, w_PD = rows.cut(slice(first, first + piece)), w_ND[first : first + piece]
            self._loops(_unpack, *rows_P, w_PD, used_PC)
            rows_P.put_escapes(w_PD, used_PC)
        if whole < num_rows:
            w_ND[whole:] = rows.cut(slice(whole, num_rows)).dense()
        return w_ND

    def prepare(self, matrix: Matrix) -> None:
        """Compiles the loops for the rows of ``matrix`` now, so that the first rows need not wait for it."""
        inner = matrix.inner
        piece = _piece_rows(inner)
        data_PB = torch.zeros(piece, row_bytes(inner), dtype=torch.uint8, device="cpu")
        rows_P = Bf12Rows.of(data_PB, data_PB.new_zeros(piece, dtype=torch.float32), inner)
        w_PD = data_PB.new_empty(piece, inner, dtype=torch.bfloat16)
        self._loops.prepare(_unpack, *rows_P, w_PD, _used(rows_P, piece))


class CompiledCodes:
    """``codes_by_word``, compiled for each number of rows: code for any number takes one code after another."""

    def __init__(self) -> None:
        self._loops = CompiledLoops()

    def __call__(self, words_NW: Tensor, zeros_NG: Tensor) -> Tensor:
        """As Int4Codes."""
        num_groups, num_words = zeros_NG.shape[1], words_NW.shape[1]
        shape = num_groups, len(words_NW), CODES_IN_WORD, num_words // num_groups
        codes_GN8C = words_NW.new_empty(shape, dtype=code_dtype())
        self._loops(_write_codes, words_NW, zeros_NG, codes_GN8C)
        return codes_GN8C

    def prepare(self, matrix: Matrix) -> None:
        """Compiles the loops for the blocks of ``matrix`` now, so that no prompt waits for it."""
        for block in matrix.blocks:
            self(*matrix.words_and_zeros(0, block))


def with_compiled_unpacking(weights: ExpertWeights) -> ExpertWeights:
    """The same weights; those of BF12, and of int4 in groups of 128, are unpacked by compiled loops.

    For CPUs with a C++ compiler. Warns and gives the weights as they are if the loops cannot be compiled.
    """
    unpack: CompiledUnpack | CompiledCodes
    if weights.format is ExpertFormat.BF12:
        unpack = CompiledUnpack()
        compiled = replace(weights, unpack=unpack)
    elif weights.format is ExpertFormat.INT4 and weights.group == INT4_GROUP:
        unpack = CompiledCodes()
        compiled = replace(weights, int4_codes=unpack)
    else:
        return weights
    try:
        for matrix in (weights.w13, weights.w2):
            unpack.prepare(matrix)
    except CompilerError as error:
        name = weights.format.name
        warnings.warn(
            f"{name} is unpacked op by op, more slowly: its loops could not be compiled ({error})", stacklevel=2
        )
        return weights
    return compiled


def _piece_rows(inner: int) -> int:
    return power_of_two(PIECE_WEIGHTS // inner)


def _used(rows: Bf12Rows, piece: int) -> Tensor:
    return rows.columns_NC.new_empty(piece, rows.columns_NC.shape[1], dtype=torch.bool)


def _write_codes(words_NW: Tensor, zeros_NG: Tensor, codes_GN8C: Tensor) -> None:
    codes_GN8C.copy_(codes_by_word(words_NW, zeros_NG))


def _unpack(
    signed_ND: Tensor,
    exponents_NB: Tensor,
    columns_NC: Tensor,
    escapes_NC: Tensor,
    scales_N: Tensor,
    w_ND: Tensor,
    used_NC: Tensor,
) -> None:
    """Unpacks all weights but the escapes into ``w_ND``, and finds which places of escapes are used.

    The latter is done here as their bytes, behind the others, are in the cache by then. Weights are made in float32
    first: from bytes to bfloat16 a compiler converts one element after another.
    """
    wide_NB, scales_N1 = exponents_NB.int(), scales_N[:, None]
    halves = zip(signed_ND.chunk(2, dim=1), (wide_NB & 15, wide_NB >> 4), strict=True)
    floats = [laid_down((signed(half_NB.int()) << places_NB).float() * scales_N1) for half_NB, places_NB in halves]
    w_ND.copy_(torch.cat([half_NB.bfloat16() for half_NB in floats], dim=1))
    used_NC.copy_(Bf12Rows(signed_ND, exponents_NB, columns_NC, escapes_NC, scales_N).used_NC())
