"""What AWQ and GPTQ share: int32 words hold eight codes of 4 bits, those of weights and those of zero-points.

N output features, D input features, G groups of D.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

from duoserve.experts.formats.codes import Part, StoredTensor
from duoserve.kernels.weights import INT4_GROUPS

CODES_IN_WORD = 8
WORD = (torch.int32,)
SCALES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Groups:
    """Groups of input features that share a scale: of ``size`` features each, or with 0 one group of all."""

    size: int

    def of(self, inner: int) -> int:
        """The number of features in a group, of ``inner`` features in all."""
        return self.size or inner

    def count(self, inner: int) -> int:
        """The number of groups of ``inner`` features; the last group may be cut short."""
        return -(-inner // self.of(inner))


def row_group(group: int, hidden: int, inter: int) -> int | None:
    """The largest group that packed rows can have for groups of ``group`` (0: of all features); None if none fits."""
    divided = gcd(group, hidden, inter)
    return max((size for size in INT4_GROUPS if divided % size == 0), default=None)


def shared_parts(base: str, num_rows: int, groups: int) -> dict[str, Part]:
    """The zero-points and scales of the module ``base``."""
    words = num_rows // CODES_IN_WORD
    return {
        "qzeros": Part(f"{base}.qzeros", StoredTensor((groups, words), WORD)),
        "scales": Part(f"{base}.scales", StoredTensor((groups, num_rows), SCALES)),
    }


def module_of(name: str) -> str:
    """The module that a matrix is the weight of."""
    return name.removesuffix(".weight")


def codes_in(words: Tensor) -> Tensor:
    """The codes in int32 words [X, Y], the lowest bits first: uint8 [X, 8 Y]. In NumPy for the reasons of lanes.py."""
    bytes_XB = words.contiguous().view(torch.uint8).numpy()
    return torch.from_numpy(np.stack((bytes_XB & 15, bytes_XB >> 4), axis=-1).reshape(len(bytes_XB), -1))
