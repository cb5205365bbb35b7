"""Turns matrices of 4-bit codes in words of 32 bits into rows of bytes, a tile at a time.

It uses NumPy's loops, as they release the GIL, stay on their thread and narrow words to bytes in vectors.
X rows of Y words; N rows of B bytes that are made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duoserve.experts.formats.codes import TILE_BYTES, StoredRows
from duoserve.experts.formats.scratch import BYTES_IN_WORD, LINE, Bytes, Scratch, Words

LOW_NIBBLES, NIBBLE = np.uint32(0x0F0F0F0F), np.uint32(4)

Convert = Callable[[Words, Bytes, Scratch], None]


@dataclass(frozen=True)
class RepackedRows:
    """RowData that is made of columns of words, a ``tile`` of rows and columns at a time.

    ``convert`` makes the bytes of a tile of words, to which it must not write. The only whole matrix in memory is the
    one that is written.
    """

    words_XY: StoredRows
    convert: Convert
    shape: tuple[int, int]
    tile: tuple[int, int]

    def write(self, out_NB: Tensor, scratch: Scratch, rows_N: Tensor | None = None) -> None:
        """As in RowData."""
        out = out_NB.numpy()
        places_N = None if rows_N is None else np.argsort(rows_N.numpy())
        (num_words, columns), (num_rows, nbytes) = self.words_XY.shape, self.shape
        for x in range(0, num_words, self.tile[0]):
            end = min(x + self.tile[0], num_words)
            words = self.words_XY[x:end].numpy().view(np.uint32)
            here = slice(x * nbytes // num_words, end * nbytes // num_words)
            for y in range(0, columns, self.tile[1]):
                tile = words[:, y : y + self.tile[1]]
                first = y * num_rows // columns
                rows = slice(first, first + tile.shape[1] * num_rows // columns)
                if places_N is None:
                    self.convert(tile, out[rows, here], scratch)
                else:
                    made = scratch.array("made", (rows.stop - first, here.stop - here.start), np.uint8)
                    self.convert(tile, made, scratch)
                    out[places_N[rows], here] = made


def wide_tile(words_XY: StoredRows, num_rows: int) -> tuple[int, int]:
    """A tile of all columns, with so many rows that it makes about TILE_BYTES, in each row an odd number of lines."""
    columns = words_XY.shape[1]
    lines = TILE_BYTES // num_rows // LINE | 1
    return lines * LINE * num_rows // (columns * BYTES_IN_WORD), columns


def transposed(rows_XY: np.ndarray) -> np.ndarray:
    """Bytes or words [X, Y] as [Y, X], in new memory; fast if columns have an odd number of cache lines.

    With an even number, the lines that are written in turn would compete for the same few places of a cache. PyTorch's
    shuffle of a pixel's channels is by definition this transposition. No other op there does it in vectors, for bytes
    and for float32, as which words are moved bit by bit; it is several times as fast as NumPy's and PyTorch's copies.
    """
    num_rows, columns = rows_XY.shape
    moved_as = rows_XY if rows_XY.dtype == np.uint8 else rows_XY.view(np.float32)
    pixel = torch.from_numpy(moved_as).reshape(1, 1, 1, -1).permute(0, 3, 1, 2)  # one pixel stays on this thread
    columns_YX: np.ndarray = torch.channel_shuffle(pixel, num_rows).view(columns, num_rows).numpy()
    return columns_YX.view(rows_XY.dtype)


def narrowed(words: Words, byte: int, out: Bytes) -> None:
    """Writes byte ``byte`` (0 is the lowest) of every word to ``out``; ``words`` must be an array of Scratch.

    NumPy narrows the unaligned words that begin at that byte, so no word has to be shifted.
    """
    moved: Words = np.ndarray(words.shape, np.uint32, words.base, byte, words.strides)
    np.copyto(out, moved, casting="unsafe")  # the low bits
