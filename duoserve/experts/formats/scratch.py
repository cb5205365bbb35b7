"""Memory that is used again and again by one thread: fresh memory would cost it as much as what is done with it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

BYTES_IN_WORD = 4
LINE = 64


class Scratch:
    """Arrays by name, each in the memory of the last one of that name. Of one thread at a time."""

    def __init__(self) -> None:
        self._memory: dict[str, Bytes] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.uint32) -> np.ndarray:
        """Contiguous, of any values; there are BYTES_IN_WORD bytes more behind it."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._memory or len(self._memory[name]) < nbytes + BYTES_IN_WORD:
            self._memory[name] = np.empty(nbytes + BYTES_IN_WORD, np.uint8)
        return self._memory[name][:nbytes].view(dtype).reshape(shape)


def odd_lines(nbytes: int) -> int:
    """Bytes of an odd number of cache lines, at least ``nbytes``."""
    return (-(-nbytes // LINE) | 1) * LINE
