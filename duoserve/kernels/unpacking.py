"""BF12 rows unpacked by loops that PyTorch's compiler makes for a CPU.

N rows of a matrix, D its inner dimension, P rows of a piece.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from duoserve.kernels.bf12 import Bf12Rows, row_bytes, signed
from duoserve.kernels.compiler import CompiledRecording, CpuCompiler
from duoserve.kernels.matmul import power_of_two
from duoserve.kernels.streamed import laid_down
from duoserve.kernels.weights import ExpertFormat, ExpertWeights

# Weights that are unpacked at a time: what is between the two loops stays in the cores' caches.
PIECE_WEIGHTS = 1 << 19


class CompiledUnpack:
    """``Bf12Rows.dense``, compiled for pieces of rows; of what is left over, op by op."""

    def __init__(self) -> None:
        self._compiler = CpuCompiler()
        self._recordings: dict[int, tuple[Bf12Rows, CompiledRecording[tuple[Tensor, Tensor]]]] = {}

    def __call__(self, rows: Bf12Rows) -> Tensor:
        """As ``Bf12Rows.dense``."""
        num_rows, inner = rows.signed_ND.shape
        piece = _piece_rows(inner)
        w_ND = torch.empty(num_rows, inner, dtype=torch.bfloat16)
        whole = num_rows - num_rows % piece
        for first in range(0, whole, piece):
            self._unpack(rows.cut(slice(first, first + piece)), w_ND[first : first + piece])
        if whole < num_rows:
            w_ND[whole:] = rows.cut(slice(whole, num_rows)).dense()
        return w_ND

    def prepare(self, inner: int) -> None:
        """Compiles what rows of so many weights take, which else the first of them would wait for."""
        if inner not in self._recordings:
            piece = _piece_rows(inner)
            rows_P = Bf12Rows.of(torch.zeros(piece, row_bytes(inner), dtype=torch.uint8), torch.zeros(piece), inner)
            self._recordings[inner] = rows_P, self._compiler.record(partial(_unpacked, rows_P))

    def _unpack(self, rows_P: Bf12Rows, w_PD: Tensor) -> None:
        self.prepare(w_PD.shape[1])
        first_P, recording = self._recordings[w_PD.shape[1]]
        unpacked_PD, used_PC = recording.result
        recording.on(dict(zip(first_P, rows_P, strict=True)) | {unpacked_PD: w_PD}).replay()
        rows_P.put_escapes(w_PD, used_PC)


def with_compiled_unpacking(weights: ExpertWeights) -> ExpertWeights:
    """The same weights; those of BF12 are unpacked by compiled loops. For CPUs with a C++ compiler."""
    if weights.format is not ExpertFormat.BF12:
        return weights
    unpack = CompiledUnpack()
    for matrix in (weights.w13, weights.w2):
        unpack.prepare(matrix.inner)
    return replace(weights, unpack=unpack)


def _piece_rows(inner: int) -> int:
    return power_of_two(PIECE_WEIGHTS // inner)


def _unpacked(rows: Bf12Rows) -> tuple[Tensor, Tensor]:
    """All but the escapes, and which places of those are used: their bytes lie behind the others, in the cache by then.

    In float32 first: from bytes to bfloat16 a compiler converts one element after another.
    """
    exponents_NB, scales_N1 = rows.exponents_NB.int(), rows.scales_N[:, None]
    halves = zip(rows.signed_ND.chunk(2, dim=1), (exponents_NB & 15, exponents_NB >> 4), strict=True)
    floats = [laid_down((signed(half_NB.int()) << places_NB).float() * scales_N1) for half_NB, places_NB in halves]
    return torch.cat([half_NB.bfloat16() for half_NB in floats], dim=1), rows.used_NC()
