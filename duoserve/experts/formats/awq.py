"""AWQ's GEMM layout. Source: Lin et al. (2024), and AutoAWQ, whose files these are.

``W[n, d] = (q - z) * s``: q in ``qweight`` [D, N / 8], z in ``qzeros`` [G, N / 8], s in ``scales`` [G, N]. A word has
eight outputs, from the lowest bits up the first, third, fifth and seventh, then the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve.experts.formats.codes import Codes, Part, StoredTensor, WeightFormat
from duoserve.experts.formats.int4 import CODES_IN_WORD, WORD, Groups, codes_in, module_of, paired, shared_parts
from duoserve.kernels.weights import ExpertFormat

NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq(WeightFormat):
    """The matrix of a module is its ``qweight``, ``qzeros`` and ``scales``."""

    groups: Groups

    def parts(self, name: str, num_rows: int, inner: int) -> dict[str, Part]:
        """As in WeightFormat."""
        base = module_of(name)
        weight = Part(f"{base}.qweight", StoredTensor((inner, num_rows // CODES_IN_WORD), WORD))
        return {"qweight": weight, **shared_parts(base, num_rows, self.groups.count(inner))}

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        """As in WeightFormat."""
        codes_DN = _in_order(parts["qweight"])
        return Codes(
            ExpertFormat.INT4,
            self.groups.of(len(codes_DN)),
            data_NB=paired(codes_DN.T),
            scales_GN=parts["scales"],
            zeros_GN=_in_order(parts["qzeros"]),
        )


def _in_order(words: Tensor) -> Tensor:
    """The codes in words [X, Y], by output: uint8 [X, 8 Y]."""
    nibbles = codes_in(words).view(len(words), -1, CODES_IN_WORD)
    return nibbles[..., torch.tensor(NIBBLE_OF_OUTPUT)].flatten(1)
