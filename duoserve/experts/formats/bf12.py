"""Encodes bfloat16 weights as BF12, without loss: see ``kernels/bf12.py``.

N rows of a matrix, D its inner dimension, B bytes of a packed row, C places for escapes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from duoserve.errors import CopyError
from duoserve.experts.formats.scratch import Scratch
from duoserve.kernels.bf12 import EXPONENTS, LEAST, Bf12Rows, room, row_bytes, used_bytes

Bits = NDArray[np.uint16]
NUM_EXPONENTS, NOT_FINITE = 256, 255
# A scale is 2^(base - 134), and a normal float32 number; a row of zeros has none.
LEAST_BASE, SCALE_BIAS, NO_BASE = 8, 134, 0


def encode(bits_ND: Bits, scratch: Scratch) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The bytes [N, B], which lie in ``scratch``, of rows of bfloat16 bits, and the scales [N].

    Raises CopyError for weights that are not finite, and for a row that has more escapes than there is room for.
    """
    num_rows, inner = bits_ND.shape
    exponents_ND = scratch.array("exponents", bits_ND.shape, np.uint16)
    np.right_shift(bits_ND, np.uint16(7), out=exponents_ND)
    np.bitwise_and(exponents_ND, np.uint16(NUM_EXPONENTS - 1), out=exponents_ND)
    top_N = exponents_ND.max(1)
    if (top_N == NOT_FINITE).any():
        raise CopyError("not all weights are finite numbers")
    bases_N = _bases(bits_ND, exponents_ND, top_N)
    # Exponents below the base wrap around, and so are outside of the window like those above it.
    np.subtract(exponents_ND, bases_N[:, None], out=exponents_ND)
    outside_ND = _outside(bits_ND, exponents_ND, bases_N)
    scales_N = np.ldexp(np.where(bases_N == NO_BASE, np.float32(0), np.float32(1)), bases_N.astype(int) - SCALE_BIAS)
    data_NB: NDArray[np.uint8] = scratch.array("rows", (num_rows, row_bytes(inner)), np.uint8)
    rows = Bf12Rows.of(torch.from_numpy(data_NB), torch.from_numpy(scales_N), inner)
    _write_weights(rows, bits_ND, exponents_ND, outside_ND)
    _write_escapes(rows, bits_ND, outside_ND)
    data_NB[:, used_bytes(inner) :] = 0
    return data_NB, scales_N


def _bases(bits_ND: Bits, exponents_ND: Bits, top_N: Bits) -> Bits:
    """The least exponent of each row's window, which ends at the largest weight.

    If that leaves too many weights outside, the window is where it leaves the fewest.
    """
    bases_N = np.maximum(top_N, LEAST_BASE + EXPONENTS - 1) - np.uint16(EXPONENTS - 1)
    bases_N[top_N == 0] = NO_BASE
    outside_N = (exponents_ND < bases_N[:, None]).sum(1)
    for n in np.flatnonzero((outside_N > room(exponents_ND.shape[1])) & (top_N > 0)):
        bases_N[n] = _best_base(bits_ND[n], exponents_ND[n])
    return bases_N


def _best_base(bits_D: Bits, exponents_D: Bits) -> int:
    counts = np.bincount(exponents_D, minlength=NUM_EXPONENTS)
    inside = np.convolve(counts[LEAST_BASE:], np.ones(EXPONENTS, int), mode="valid")
    zeros = np.count_nonzero(bits_D << np.uint16(1) == 0)
    return NO_BASE if zeros > inside.max() else LEAST_BASE + int(inside.argmax())


def _outside(bits_ND: Bits, places_ND: Bits, bases_N: Bits) -> NDArray[np.bool_]:
    """Which weights are escapes; in a row without a base, all but zeros. Raises CopyError if there are too many."""
    outside_ND: NDArray[np.bool_] = places_ND >= EXPONENTS
    none_N = bases_N == NO_BASE
    outside_ND[none_N] = bits_ND[none_N] << np.uint16(1) != 0
    most, places = int(outside_ND.sum(1).max(initial=0)), room(bits_ND.shape[1])
    if most > places:
        raise CopyError(
            f"bf12 has room for {places} weights of a row outside {EXPONENTS} exponents, and one has {most}: "
            "these experts keep their bits in bfloat16 only"
        )
    return outside_ND


def _write_weights(rows: Bf12Rows, bits_ND: Bits, places_ND: Bits, outside_ND: NDArray[np.bool_]) -> None:
    signed_ND, half = rows.signed_ND.numpy(), bits_ND.shape[1] // 2
    negative_ND = bits_ND.view(np.int16) >> np.int16(15)
    np.copyto(signed_ND, (bits_ND.view(np.int16) & np.int16(127)) ^ negative_ND, casting="unsafe")
    signed_ND[outside_ND] = 0
    places_ND[outside_ND] = 0
    pairs_NB = places_ND[:, half:] << np.uint16(4)
    np.copyto(rows.exponents_NB.numpy(), np.bitwise_or(pairs_NB, places_ND[:, :half], out=pairs_NB), casting="unsafe")


def _write_escapes(rows: Bf12Rows, bits_ND: Bits, outside_ND: NDArray[np.bool_]) -> None:
    rows.columns_NC.zero_()
    rows.escapes_NC.copy_((LEAST * rows.scales_N)[:, None])
    found, columns = np.nonzero(outside_ND)
    places = np.arange(len(found)) - np.searchsorted(found, found)
    rows.columns_NC.numpy()[found, places] = columns
    rows.escapes_NC.view(torch.int16).numpy()[found, places] = bits_ND[found, columns].view(np.int16)
