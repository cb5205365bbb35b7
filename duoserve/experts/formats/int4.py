"""What AWQ and GPTQ share: eight codes of 4 bits in a word of int32, of outputs' zero-points and of the weights.

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
    """``size`` input features share a scale; 0 stands for all that there are."""

    size: int

    def of(self, inner: int) -> int:
        """Features in a group of ``inner``."""
        return self.size or inner

    def count(self, inner: int) -> int:
        """Groups of ``inner``, the last of which may be cut short."""
        return -(-inner // self.of(inner))


def row_group(group: int, hidden: int, inter: int) -> int | None:
    """The largest group that packed rows can have for groups of ``group`` (0: of all features); None: there is none."""
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
    """The codes in int32 words [X, Y], the lowest bits first: uint8 [X, 8 Y]. In NumPy, on one thread: see lanes.py."""
    bytes_XB = words.contiguous().view(torch.uint8).numpy()
    return torch.from_numpy(np.stack((bytes_XB & 15, bytes_XB >> 4), axis=-1).reshape(len(bytes_XB), -1))
