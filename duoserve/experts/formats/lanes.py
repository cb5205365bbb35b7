"""Matrices of 4-bit codes in words of 32 bits, turned into rows of bytes a tile at a time.

NumPy's loops, for they release the GIL, stay on their thread and narrow words to bytes in vectors. They transpose words
several times as fast as bytes. X rows of Y words; N rows of B bytes that come of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]
Convert = Callable[[Words, Bytes], None]

LOW_NIBBLES, NIBBLE, BYTE = np.uint32(0x0F0F0F0F), np.uint32(4), np.uint32(8)
BYTES_IN_WORD = 4
PIECE_WORDS = 1 << 13  # transposed at once: 32 KiB, which the nearest cache holds


@dataclass(frozen=True)
class RepackedRows:
    """Rows that are made of columns of words, some columns of some rows at a time: ``tile`` rows and columns of them.

    ``convert`` fills the bytes of a tile, which it may not write to. What it makes on the way stays in a core's cache.
    No second matrix is held but in the place that it is written to.
    """

    words_XY: Tensor
    convert: Convert
    shape: tuple[int, int]
    tile: tuple[int, int]

    def write(self, out_NB: Tensor, rows_N: Tensor | None = None) -> None:
        """Fills ``out_NB``, whose row n is row ``rows_N[n]`` of the matrix, or n."""
        words, out = self.words_XY.numpy().view(np.uint32), out_NB.numpy()
        places_N = None if rows_N is None else np.argsort(rows_N.numpy())
        (num_words, columns), (num_rows, nbytes) = words.shape, self.shape
        for x in range(0, num_words, self.tile[0]):
            end = min(x + self.tile[0], num_words)
            here = slice(x * nbytes // num_words, end * nbytes // num_words)
            for y in range(0, columns, self.tile[1]):
                tile = words[x:end, y : y + self.tile[1]]
                first = y * num_rows // columns
                rows = slice(first, first + tile.shape[1] * num_rows // columns)
                if places_N is None:
                    self.convert(tile, out[rows, here])
                else:
                    out[places_N[rows], here] = self._converted(tile, rows.stop - first, here.stop - here.start)

    def _converted(self, tile: Words, num_rows: int, nbytes: int) -> Bytes:
        made = np.empty((num_rows, nbytes), np.uint8)
        self.convert(tile, made)
        return made


def transposed(words: Words, out: Bytes) -> None:
    """Words [X, Y] as they are, to rows [Y, 4 X] whose bytes are contiguous."""
    words_out, step = out.view(np.uint32), max(1, PIECE_WORDS // words.shape[1])
    for x in range(0, len(words), step):
        np.copyto(words_out[:, x : x + step], words[x : x + step].T)


def bytes_transposed(words: Words, outs: list[Bytes]) -> None:
    """Byte ``i`` of every word [X, Y], the lowest first, to ``outs[i]`` [Y, X]."""
    words_YX = np.empty(words.shape[::-1], np.uint32)
    transposed(words, words_YX.view(np.uint8))
    for out in outs:
        np.copyto(out, words_YX, casting="unsafe")  # the low bits
        words_YX >>= BYTE
