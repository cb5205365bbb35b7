"""Matrices of 4- and 8-bit elements in int32 words, moved a word at a time.

PyTorch transposes bytes one by one; words it transposes four times as fast, and the rest it does to whole vectors.
X rows of Y words, each of L lanes of some bits, the lowest bits first; N rows of B bytes that come of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32
TILE_BYTES = 1 << 20  # of words that are in work at once: they and what is made of them stay in a core's cache
COLUMNS = 16  # a tile's are a multiple of these: whole lines of the cache


@dataclass(frozen=True)
class RepackedRows:
    """Rows that are made of columns of words: ``convert`` makes int32 words [tile's rows, B / 4] of a tile [X, Y].

    No second matrix is held but in the place that it is written to.
    """

    words_XY: Tensor
    convert: Callable[[Tensor], Tensor]
    shape: tuple[int, int]

    def write(self, out_NB: Tensor, rows_N: Tensor | None = None) -> None:
        """Fills ``out_NB``, whose row n is row ``rows_N[n]`` of the matrix, or n."""
        words_out, start = out_NB.view(torch.int32), 0
        places_N = None if rows_N is None else torch.argsort(rows_N)
        for tile in torch.split(self.words_XY, self._tile_columns, dim=1):
            part = self.convert(tile)
            here = slice(start, start + len(part))
            if places_N is None:
                words_out[here] = part
            else:
                words_out.index_copy_(0, places_N[here], part)
            start += len(part)

    @property
    def _tile_columns(self) -> int:
        line_bytes = COLUMNS * self.words_XY.element_size()
        return max(1, TILE_BYTES // (len(self.words_XY) * line_bytes)) * COLUMNS


def transposed(words_XY: Tensor, lanes: Sequence[int]) -> Tensor:
    """The transpose of a matrix [X, L Y] of elements of 32 / L bits: int32 words [L Y, X / L].

    Element ``i`` of every L in a row of the matrix is in lane ``lanes[i]`` of its word; L is a power of two, and X a
    multiple of it.
    """
    blocks_XLY = words_XY.clone().view(-1, len(lanes), words_XY.shape[1])
    distance = len(lanes) // 2
    while distance:
        _swap_halves(blocks_XLY, distance, distance * WORD_BITS // len(lanes))
        distance //= 2
    rows_LYX = blocks_XLY.flatten(1).T.contiguous().view(len(lanes), words_XY.shape[1], -1)
    return torch.stack([rows_LYX[lane] for lane in lanes], dim=1).flatten(0, 1)


def nibbles_of(words_XY: Tensor) -> Tensor:
    """The eight codes of words, the lowest first, in a byte each: uint8 [8 X, Y]."""
    codes_X42Y = torch.empty(len(words_XY), 4, 2, words_XY.shape[1], dtype=torch.uint8)
    words, bytes_XY = words_XY.clone(), torch.empty(words_XY.shape, dtype=torch.uint8)
    for byte in range(4):
        bytes_XY.copy_(words)  # their low bits
        torch.bitwise_and(bytes_XY, 15, out=codes_X42Y[:, byte, 0])
        torch.bitwise_right_shift(bytes_XY, 4, out=codes_X42Y[:, byte, 1])
        words >>= 8
    return codes_X42Y.flatten(0, 2)


def _swap_halves(blocks_XLY: Tensor, distance: int, shift: int) -> None:
    """In blocks of 2 ``distance`` rows and lanes, swaps the upper lanes of upper rows and the lower of lower ones."""
    pairs = blocks_XLY.view(len(blocks_XLY), -1, 2, distance, blocks_XLY.shape[2])
    upper, lower = pairs[:, :, 0], pairs[:, :, 1]
    moved = (upper >> shift).bitwise_xor_(lower).bitwise_and_(_low_lanes(shift))
    lower.bitwise_xor_(moved)
    upper.bitwise_xor_(moved.bitwise_left_shift_(shift))


def _low_lanes(shift: int) -> int:
    """Ones in the lower ``shift`` of every 2 ``shift`` bits."""
    return sum(((1 << shift) - 1) << start for start in range(0, WORD_BITS, 2 * shift))
