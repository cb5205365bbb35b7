"""GPTQ in both versions, with and without an order of features. Source: Frantar et al. (2023), and gptqmodel.

``W[n, d] = (q - z) * s`` with z and s of the group ``g_idx[d]``: q in ``qweight`` [D / 8, N], eight inputs in a word,
z in ``qzeros`` [G, N / 8], eight outputs in a word, s in ``scales`` [G, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from duoserve.errors import CheckpointError
from duoserve.experts.formats.codes import Codes, Part, StoredRows, StoredTensor, WeightFormat
from duoserve.experts.formats.int4 import CODES_IN_WORD, WORD, Groups, codes_in, module_of, shared_parts
from duoserve.experts.formats.lanes import NIBBLE, RepackedRows, narrowed, transposed, wide_tile
from duoserve.experts.formats.scratch import BYTES_IN_WORD, Bytes, Scratch, Words, odd_lines
from duoserve.kernels.weights import ExpertFormat

ONES, EIGHTS = 0x11111111, 0x88888888 - (1 << 32)
ORDERED_WORDS = 1 << 18  # words of a tile with an order, which has all rows, as inputs come from any of them
LOW_NIBBLE, SIXTEEN = np.uint8(15), np.uint8(16)


@dataclass(frozen=True)
class Gptq(WeightFormat):
    """The matrix of a module is its ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    ``less_one``: version 1, in which each zero-point is stored as one less than it is. ``symmetric``: all zero-points
    are 8. ``ordered``: neighbouring features may be in different groups.
    """

    groups: Groups
    less_one: bool
    symmetric: bool
    ordered: bool

    def parts(self, name: str, num_rows: int, inner: int) -> dict[str, Part]:
        base = module_of(name)
        return {
            "data": Part(f"{base}.qweight", StoredTensor((inner // CODES_IN_WORD, num_rows), WORD)),
            **shared_parts(base, num_rows, self.groups.count(inner)),
            "g_idx": Part(f"{base}.g_idx", StoredTensor((inner,), WORD)),
        }

    def codes(self, data: StoredRows, parts: Mapping[str, Tensor]) -> Codes:
        order_D = self._order(parts["g_idx"])
        return Codes(
            ExpertFormat.INT4,
            self.groups.of(len(order_D)),
            _outputs(data, order_D if self.ordered else None),
            scales_GN=parts["scales"],
            zeros_GN=codes_in(self._zero_words(parts["qzeros"])),
            order_D=order_D if self.ordered else None,
        )

    def _order(self, g_idx_D: Tensor) -> Tensor:
        """The features group by group (int64); raises CheckpointError unless groups have the right sizes and order."""
        order_D = torch.argsort(g_idx_D, stable=True)
        inner = len(order_D)
        in_groups_D = torch.arange(inner, device="cpu") // self.groups.of(inner)
        if not torch.equal(g_idx_D[order_D], in_groups_D.int()):
            raise CheckpointError(f"g_idx does not put {inner} features into groups of {self.groups.of(inner)}")
        if not self.ordered and not torch.equal(g_idx_D, in_groups_D.int()):
            raise CheckpointError("g_idx has features in an order of their own, but desc_act is false in config.json")
        return order_D

    def _zero_words(self, qzeros: Tensor) -> Tensor:
        """Words of the true zero-points.

        Ones are added to a whole word, as they were subtracted from a whole word: a zero-point of 0 borrowed from its
        neighbour. Some files of version 2 claim to be of version 1, which can be seen if they are symmetric.
        """
        is_plain = self.symmetric and bool((qzeros == EIGHTS).all())
        return qzeros + ONES if self.less_one and not is_plain else qzeros


def _outputs(words_WN: StoredRows, order_D: Tensor | None) -> RepackedRows:
    """The codes of ``words_WN``, repacked; inputs lie from the lowest bits up in words, and two in each byte."""
    words, num_rows = words_WN.shape
    shape = num_rows, words * BYTES_IN_WORD
    if order_D is None:
        return RepackedRows(words_WN, _as_they_are, shape, wide_tile(words_WN, num_rows))
    order = order_D.numpy()
    word, nibble = divmod(order, CODES_IN_WORD)
    places_D = (nibble % 2 * BYTES_IN_WORD + nibble // 2) * words + word
    convert = partial(_reordered, even_D=places_D[0::2].copy(), odd_D=places_D[1::2].copy())
    return RepackedRows(words_WN, convert, shape, (words, odd_lines(ORDERED_WORDS // words)))


def _as_they_are(words: Words, out: Bytes, scratch: Scratch) -> None:
    """Turns each column of words into a row of bytes."""
    np.copyto(out.view(np.uint32), transposed(words))


def _reordered(words: Words, out: Bytes, scratch: Scratch, even_D: np.ndarray, odd_D: np.ndarray) -> None:
    """Fills each byte of ``out`` with the codes at a place of ``even_D`` and, above it, at one of ``odd_D``."""
    bytes_DN, (pairs, columns) = _codes(words, scratch), (len(even_D), words.shape[1])
    padded, odd = (scratch.array(name, (odd_lines(pairs), columns), np.uint8) for name in ("even", "odd"))
    even, odd = padded[:pairs], odd[:pairs]
    bytes_DN.take(even_D, axis=0, out=even, mode="clip")  # in other modes NumPy buffers ``out``
    bytes_DN.take(odd_D, axis=0, out=odd, mode="clip")
    np.bitwise_and(even, LOW_NIBBLE, even)
    np.multiply(odd, SIXTEEN, odd)  # NumPy shifts bytes without vectors
    np.bitwise_or(even, odd, even)
    np.copyto(out, transposed(padded)[:, :pairs])


def _codes(words: Words, scratch: Scratch) -> Bytes:
    """The bytes [8 X, Y] of words [X, Y]: the lowest bytes of all words first, and so on; then all again, shifted down
    by half a byte. So each code is in the low half of a byte; above it is another.
    """
    words_XY, bytes_24XY = scratch.array("words", words.shape), scratch.array("codes", (2, 4, *words.shape), np.uint8)
    np.copyto(words_XY, words)
    for byte, bytes_XY in enumerate(bytes_24XY[0]):
        narrowed(words_XY, byte, bytes_XY)
    low, high = bytes_24XY.view(np.uint32)
    np.right_shift(low, NIBBLE, high)
    codes: Bytes = bytes_24XY.reshape(-1, words.shape[1])
    return codes
