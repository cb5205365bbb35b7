"""Reads the header of a safetensors file: eight bytes of length, a JSON object, then the tensors' bytes end to end.

The file is untrusted: nothing is allocated by what it claims before the claim has been checked against a cap or against
the size of the file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duoserve.errors import CheckpointError, CutShortError
from duoserve.files.positional import PositionalFile
from duoserve.files.strict_json import parse_object
from duoserve.number_checks import is_integer

MAX_HEADER_BYTES = 16 << 20  # the largest in public use, with 90 thousand tensors, have 10 MB
MAX_TENSORS = 200_000
_MAX_DIMS = 16
_LENGTH_BYTES = 8
_LFS_POINTER = b"version "  # of https://git-lfs.github.com/spec/v1; no header is as long as this would mean
_REMEDY = "the file is damaged or malicious; download or save it again"

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``nbytes`` bytes from byte ``offset`` of ``file`` (counted from the start of the file)."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def part(self, entry: int | None = None, rows: tuple[int, int] | None = None) -> TensorInfo:
        """Part ``entry`` of the first dimension, and of that (or of the whole) rows ``rows[0]`` to before ``rows[1]``.

        Its bytes are one range.
        """
        part = self
        if entry is not None:
            part = part._cut(entry, entry + 1)
            part = replace(part, shape=part.shape[1:])
        return part if rows is None else part._cut(*rows)

    def _cut(self, start: int, stop: int) -> TensorInfo:
        row_bytes = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row_bytes, nbytes=(stop - start) * row_bytes)


@dataclass(frozen=True)
class SafetensorsHeader:
    """The tensors in the order of their bytes, the SHA-256 of the header's JSON, the metadata in it, and the byte of
    the file behind the last tensor.
    """

    tensors: tuple[TensorInfo, ...]
    sha256: bytes
    metadata: dict[str, str]
    end: int


def read_header(file: PositionalFile) -> SafetensorsHeader:
    """The checked header of an open file; CheckpointError says what is wrong with it."""
    header = read_segment(file, 0)
    if header.end != file.size:
        raise CheckpointError(
            f"{file.path}: followed by bytes of no tensor: {file.size} bytes, its tensors end at byte {header.end}; "
            f"{_REMEDY}"
        )
    return header


def read_segment(file: PositionalFile, start: int) -> SafetensorsHeader:
    """The checked header of what begins at byte ``start``. More may follow it; CutShortError if the file ends in it."""
    raw = _header_bytes(file, start)
    entries = parse_object(raw, file.path)
    metadata = _checked_metadata(entries.pop("__metadata__", None), file.path)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{file.path}: {len(entries)} tensors, more than the {MAX_TENSORS} allowed; {_REMEDY}")
    data_start = start + _LENGTH_BYTES + len(raw)
    tensors = [_tensor(name, entry, file.path, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = _check_cover(tensors, file, data_start)
    return SafetensorsHeader(tuple(tensors), hashlib.sha256(raw).digest(), metadata, end)


def _header_bytes(file: PositionalFile, start: int) -> bytes:
    room = file.size - start - _LENGTH_BYTES
    if room < 0:
        raise CutShortError(f"{file.path}: {file.size} bytes, too short for a safetensors file; {_REMEDY}")
    first = file.read(start, _LENGTH_BYTES)
    if first == _LFS_POINTER:
        raise CheckpointError(f"{file.path}: only points to its content in Git LFS; git lfs pull brings that")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file.path}: header of {length} bytes, {MAX_HEADER_BYTES} are allowed; {_REMEDY}")
    if length > room:
        raise CutShortError(f"{file.path}: header of {length} bytes in a file of {file.size}; {_REMEDY}")
    return file.read(start + _LENGTH_BYTES, length)


def _checked_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text; {_REMEDY}")
    return metadata


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets; {_REMEDY}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has the dtype {entry['dtype']!r}; readable are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where} has the shape {shape!r:.200}, not up to {_MAX_DIMS} sizes; {_REMEDY}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has the data_offsets {offsets!r:.200}, not a start and an end; {_REMEDY}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} spans bytes {offsets[0]} to {offsets[1]}, but {entry['dtype']} {shape} takes {nbytes}; {_REMEDY}"
        )
    return TensorInfo(name, path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    """Whether ``value`` is a list of integers that a 64-bit size can hold."""
    return isinstance(value, list) and all(is_integer(n) and 0 <= n < 1 << 63 for n in value)


def _check_cover(tensors: Iterable[TensorInfo], file: PositionalFile, data_start: int) -> int:
    """Where the tensors (in the order of their bytes) end; there must be no hole and no overlap."""
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            fault = "a hole before" if tensor.offset > end else "an overlap at"
            raise CheckpointError(f"{file.path}: {fault} tensor {tensor.name!r} (byte {tensor.offset}); {_REMEDY}")
        end += tensor.nbytes
    if end > file.size:
        raise CutShortError(f"{file.path}: truncated: {file.size} bytes, its tensors end at byte {end}; {_REMEDY}")
    return end
