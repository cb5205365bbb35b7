"""AWQ's GEMM layout. Source: Lin et al. (2024), and AutoAWQ, whose files these are.

``W[n, d] = (q - z) * s``: q in ``qweight`` [D, N / 8], z in ``qzeros`` [G, N / 8], s in ``scales`` [G, N]. A word has
eight outputs: from the lowest bits up the first, third, fifth and seventh, then the second, fourth, sixth and eighth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duoserve.experts.formats.codes import Codes, Part, StoredRows, StoredTensor, WeightFormat
from duoserve.experts.formats.int4 import CODES_IN_WORD, WORD, Groups, codes_in, module_of, shared_parts
from duoserve.experts.formats.lanes import LOW_NIBBLES, NIBBLE, RepackedRows, transposed, wide_tile
from duoserve.experts.formats.scratch import Bytes, Scratch, Words
from duoserve.kernels.weights import ExpertFormat

NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq(WeightFormat):
    """The matrix of a module is its ``qweight``, ``qzeros`` and ``scales``."""

    groups: Groups

    def parts(self, name: str, num_rows: int, inner: int) -> dict[str, Part]:
        base = module_of(name)
        weight = Part(f"{base}.qweight", StoredTensor((inner, num_rows // CODES_IN_WORD), WORD))
        return {"data": weight, **shared_parts(base, num_rows, self.groups.count(inner))}

    def codes(self, data: StoredRows, parts: Mapping[str, Tensor]) -> Codes:
        return Codes(
            ExpertFormat.INT4,
            self.groups.of(data.shape[0]),
            _outputs(data),
            scales_GN=parts["scales"],
            zeros_GN=_by_output(codes_in(parts["qzeros"])),
        )


def _outputs(words_DW: StoredRows) -> RepackedRows:
    """The codes of ``words_DW``, repacked with two inputs in a byte."""
    inputs, words = words_DW.shape
    num_rows = words * CODES_IN_WORD
    return RepackedRows(words_DW, _convert, (num_rows, inputs // 2), wide_tile(words_DW, num_rows))


def _convert(words: Words, out: Bytes, scratch: Scratch) -> None:
    """Brings each output's codes of two inputs together in a byte of a word, then the bytes of words to their rows."""
    even, odd, (inputs, columns) = words[0::2], words[1::2], words.shape
    swapped = scratch.array("swapped", even.shape)
    halves_X2W = scratch.array("halves", (inputs // 2, 2, columns))
    np.right_shift(even, NIBBLE, swapped)
    np.bitwise_xor(swapped, odd, swapped)
    np.bitwise_and(swapped, LOW_NIBBLES, swapped)
    np.bitwise_xor(odd, swapped, halves_X2W[:, 1])  # has even's upper nibbles below its own
    np.left_shift(swapped, NIBBLE, swapped)
    np.bitwise_xor(even, swapped, halves_X2W[:, 0])  # has odd's lower nibbles above its own
    # A byte of the first half has nibble 0, 2, 4 or 6 of the word, one of the second the nibble above it.
    bytes_2W22X = transposed(halves_X2W.view(np.uint8).reshape(inputs // 2, -1)).reshape(2, columns, 2, 2, -1)
    np.copyto(out.reshape(columns, 2, 2, 2, -1), bytes_2W22X.transpose(1, 3, 0, 2, 4))


def _by_output(by_nibble_GN: Tensor) -> Tensor:
    """The columns, from the order in words to the order of outputs."""
    by_nibble = by_nibble_GN.numpy()
    eights_GWE = by_nibble.reshape(len(by_nibble), -1, CODES_IN_WORD)
    return torch.from_numpy(eights_GWE[:, :, NIBBLE_OF_OUTPUT].reshape(by_nibble.shape))
