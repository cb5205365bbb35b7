"""Memory that one thread uses again and again: getting fresh memory would cost as much as the work on it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

BYTES_IN_WORD = 4
LINE = 64


class Scratch:
    """Arrays by name, each in the memory of the last array of that name. For one thread at a time."""

    def __init__(self) -> None:
        self._memory: dict[str, Bytes] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.uint32) -> np.ndarray:
        """A contiguous array of any values, with BYTES_IN_WORD more bytes behind it."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._memory or len(self._memory[name]) < nbytes + BYTES_IN_WORD:
            self._memory[name] = np.empty(nbytes + BYTES_IN_WORD, np.uint8)
        return self._memory[name][:nbytes].view(dtype).reshape(shape)


def odd_lines(nbytes: int) -> int:
    """``nbytes``, rounded up to an odd number of cache lines."""
    return (-(-nbytes // LINE) | 1) * LINE
