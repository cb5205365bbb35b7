"""Files in GGUF, version 3, for llama.cpp: typed metadata, the directory of the tensors, and their aligned bytes.

Tensors are bf16, f32, or blocks of 32 weights along a row, each block a float16 scale before its codes: 32 signed
bytes in q8_0, in q4_0 16 bytes that hold four bits of two weights each.

R rows, C columns, B blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

VERSION = 3
ALIGNMENT = 32  # the format's default: no key says so
BLOCK, Q4_BLOCK_BYTES, Q8_BLOCK_BYTES = 32, 18, 34
Q4_ZERO, Q4_MOST, Q8_LARGEST = 8, 15, 127
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9  # the types of metadata that are written here

Value = int | float | str | Sequence[str] | Sequence[int] | Sequence[float]


class Kind(IntEnum):
    """How a tensor's weights are stored, by the format's numbers."""

    F32 = 0
    Q4_0 = 2
    Q8_0 = 8
    BF16 = 30

    def size(self, numel: int) -> int:
        """Bytes of ``numel`` weights."""
        if self in QUANTIZERS:
            return numel // BLOCK * (Q4_BLOCK_BYTES if self is Kind.Q4_0 else Q8_BLOCK_BYTES)
        return numel * (4 if self is Kind.F32 else 2)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its shape with the innermost dimension last, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding not counted."""
        return self.kind.size(torch.Size(self.shape).numel())


def write(path: Path, metadata: Mapping[str, Value], entries: Sequence[Entry]) -> None:
    """The whole file, one tensor in memory at a time; ValueError where a tensor is not as its entry says."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(entries), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _typed(value))
        _write_directory(file, entries)
        for entry in entries:
            _pad(file)
            file.write(encoded(entry))


def _write_directory(file: BinaryIO, entries: Iterable[Entry]) -> None:
    """Names, sizes (the innermost first), kinds, and offsets from the first tensor's byte."""
    offset = 0
    for entry in entries:
        sizes = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        file.write(_string(entry.name) + sizes + struct.pack("<IQ", entry.kind, offset))
        offset += _aligned(entry.nbytes)


def encoded(entry: Entry) -> bytes:
    """The tensor's bytes."""
    tensor = entry.read().contiguous()
    if tensor.shape != entry.shape:
        raise ValueError(f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}")
    if entry.kind in QUANTIZERS:
        return QUANTIZERS[entry.kind](tensor.reshape(-1, tensor.shape[-1]))
    dtype = torch.float32 if entry.kind is Kind.F32 else torch.bfloat16
    return _bytes(tensor.to(dtype))


def q8_0(weights_RC: Tensor) -> bytes:
    """The blocks, row by row; ValueError where a row is no whole number of blocks.

    A block's scale takes its largest weight to 127; the codes are rounded by the scale before it is cut to float16,
    half away from zero, as llama.cpp does.
    """
    blocks_BC = _blocks(weights_RC)
    scales_B1 = blocks_BC.abs().amax(dim=1, keepdim=True) / Q8_LARGEST
    scaled_BC = _scaled(blocks_BC, scales_B1)
    codes_BC = (scaled_BC.abs() + 0.5).floor().copysign(scaled_BC).to(torch.int8)
    return _bytes(torch.cat([scales_B1.half().view(torch.int8), codes_BC], dim=1))


def q4_0(weights_RC: Tensor) -> bytes:
    """The blocks, row by row; ValueError where a row is no whole number of blocks.

    A block's scale takes the weight that is largest, whatever its sign, to code 0, and zero to code 8, half rounded up.
    Byte n has the code of weight n in its lower bits, and that of weight n + 16 in its upper bits. As llama.cpp does.
    """
    blocks_BC = _blocks(weights_RC)
    largest_B1 = blocks_BC.gather(1, blocks_BC.abs().argmax(dim=1, keepdim=True))
    scales_B1 = largest_B1 / -Q4_ZERO
    codes_BC = (_scaled(blocks_BC, scales_B1) + Q4_ZERO + 0.5).floor().clamp(max=Q4_MOST).to(torch.uint8)
    low_BC, high_BC = codes_BC.chunk(2, dim=1)
    return _bytes(torch.cat([scales_B1.half().view(torch.uint8), low_BC | high_BC << 4], dim=1))


QUANTIZERS = {Kind.Q4_0: q4_0, Kind.Q8_0: q8_0}


def _blocks(weights_RC: Tensor) -> Tensor:
    if weights_RC.shape[-1] % BLOCK:
        raise ValueError(f"rows of {weights_RC.shape[-1]} weights are no blocks of {BLOCK}")
    return weights_RC.float().reshape(-1, BLOCK)


def _scaled(blocks_BC: Tensor, scales_B1: Tensor) -> Tensor:
    return torch.where(scales_B1 == 0, 0.0, blocks_BC / scales_B1)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _typed(value: Value) -> bytes:
    """The value behind the number of its type; a sequence has its first item's."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    return struct.pack("<I", ARRAY) + _items(value)


def _items(values: Sequence[str] | Sequence[int] | Sequence[float]) -> bytes:
    if isinstance(values[0], str):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(_string(str(value)) for value in values)
    kind, code = (INT32, "i") if isinstance(values[0], int) else (FLOAT32, "f")
    return struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values)


def _string(text: str) -> bytes:
    coded = text.encode()
    return struct.pack("<Q", len(coded)) + coded


def _pad(file: BinaryIO) -> None:
    position = file.tell()
    file.write(bytes(_aligned(position) - position))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
