"""A small reader of GGUF, written from the format's description and not from its writer ``bench/cpu/gguf_file.py``."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, Q4_0, Q8_0, BF16 = 0, 2, 8, 30


@dataclass
class GgufFile:
    """Metadata, and each tensor as (kind, float32 array with the innermost dimension last)."""

    version: int
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)


def read_gguf(path: Path) -> GgufFile:
    """All of it, decoded; AssertionError where it is no GGUF or an offset is not aligned."""
    return _Reader(path.read_bytes()).whole()


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def whole(self) -> GgufFile:
        assert self.data[:4] == b"GGUF"
        self.at = 4
        version, num_tensors, num_keys = self.take("I"), self.take("Q"), self.take("Q")
        found = GgufFile(version, {self.string(): self.value(self.take("I")) for _ in range(num_keys)})
        directory = [self.entry() for _ in range(num_tensors)]
        alignment = found.metadata.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        for name, shape, kind, offset in directory:
            assert offset % alignment == 0
            found.tensors[name] = (kind, self.decoded(start + offset, shape, kind))
        return found

    def take(self, code: str) -> Any:
        [value] = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        size = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.take("I"), self.take("Q")
            return [self.value(item) for _ in range(count)]
        return self.take(SCALARS[kind])

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.take("I")
        innermost_first = [self.take("Q") for _ in range(dimensions)]
        return name, tuple(reversed(innermost_first)), self.take("I"), self.take("Q")

    def decoded(self, at: int, shape: tuple[int, ...], kind: int) -> np.ndarray:
        count = int(np.prod(shape))
        if kind == F32:
            return np.frombuffer(self.data, "<f4", count, at).reshape(shape)
        if kind == BF16:
            high = np.frombuffer(self.data, "<u2", count, at).astype("<u4")
            return (high << 16).view("<f4").reshape(shape)
        assert kind in (Q4_0, Q8_0)
        codes = ("codes", "u1", 16) if kind == Q4_0 else ("codes", "i1", 32)
        blocks = np.frombuffer(self.data, np.dtype([("scale", "<f2"), codes]), count // 32, at)
        found = blocks["codes"].astype("f4")
        if kind == Q4_0:
            found = np.concatenate([found % 16, found // 16], axis=1) - 8
        return (blocks["scale"].astype("f4")[:, None] * found).reshape(shape)
