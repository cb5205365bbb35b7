"""Safetensors files made byte by byte, so that tests can make them wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def blob(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """The bytes of a file with this header (a dict, or its JSON) and these tensor bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_bytes_tensors(path: Path, **tensors: bytes) -> None:
    """A file of one-dimensional U8 tensors."""
    header, data = {}, b""
    for name, content in tensors.items():
        header[name] = entry(len(data), len(data) + len(content), [len(content)])
        data += content
    path.write_bytes(blob(header, data))


def write_index(folder: Path, weight_map: Any) -> None:
    """The index with this weight_map."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def single_file(folder: Path) -> Path:
    """Makes ``folder`` a checkpoint of one tensor, ``x``, of the bytes "abcd"."""
    (folder / "config.json").write_text("{}")
    write_bytes_tensors(folder / SINGLE, x=b"abcd")
    return folder


def two_shards(folder: Path) -> Path:
    """Makes ``folder`` a checkpoint with ``x`` ("abcd") in one shard and ``y`` ("efgh") in another."""
    (folder / "config.json").write_text("{}")
    write_bytes_tensors(folder / "one.safetensors", x=b"abcd")
    write_bytes_tensors(folder / "two.safetensors", y=b"efgh")
    write_index(folder, {"x": "one.safetensors", "y": "two.safetensors"})
    return folder
