"""The header parser: reads what the safetensors library writes, refuses everything else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from duoserve.errors import CheckpointError
from duoserve.experts import safetensors_header
from duoserve.experts.safetensors_header import DTYPES, MAX_HEADER_BYTES, SafetensorsHeader, read_header
from duoserve.files.positional import PositionalFile
from tests.experts.safetensors_files import blob, entry

GOOD = {"a": entry(0, 4, [2, 2]), "b": entry(4, 8, [4])}

MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes, too short"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
    "seven bytes": (b"\0" * 7, "7 bytes, too short"),
    "header beyond the file": (blob(GOOD)[:-1], "header of .* bytes in a file of"),
    "header over the cap": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "16777217 bytes, 16777216 are"),
    "header of 2**64-1 bytes": (b"\xff" * 8 + b"{}", "18446744073709551615 bytes, 16777216 are"),
    "no JSON": (blob(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "not valid JSON"),
    "not an object": (blob(b"[1]"), "holds a JSON list"),
    "nested too deep": (blob(b"[" * 100_000), "not valid JSON"),
    "a number too long": (blob(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a name twice": (blob(b'{"a": {}, "a": {}}'), "'a' stands 2 times"),
    "a key twice within a tensor": (blob(b'{"a": {"dtype": "U8", "dtype": "U8"}}'), "'dtype' stands 2 times"),
    "metadata no object": (blob({"__metadata__": 7}), "__metadata__ must map text to text"),
    "metadata not text": (blob({"__metadata__": {"format": 1}}), "__metadata__ must map text to text"),
    "entry no object": (blob({"a": 7}), "'a' must have exactly dtype, shape and data_offsets"),
    "entry without shape": (blob({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "'a' must have exactly"),
    "entry with more": (blob({"a": entry(0, 0, [0]) | {"x": 1}}), "'a' must have exactly"),
    "unknown dtype": (blob({"a": entry(0, 1, [1], "F4")}, b"\0"), "'a' has the dtype 'F4'; readable are BF16"),
    "dtype no text": (blob({"a": entry(0, 1, [1]) | {"dtype": ["U8"]}}, b"\0"), "'a' has the dtype"),
    "shape no list": (blob({"a": entry(0, 1, [1]) | {"shape": 1}}, b"\0"), "'a' has the shape 1"),
    "negative size": (blob({"a": entry(0, 1, [-1, -1])}, b"\0"), r"'a' has the shape \[-1, -1\]"),
    "size no integer": (blob({"a": entry(0, 1, [1]) | {"shape": [1.0]}}, b"\0"), r"'a' has the shape \[1.0\]"),
    "size a bool": (blob({"a": entry(0, 1, [1]) | {"shape": [True]}}, b"\0"), r"'a' has the shape \[True\]"),
    "size over 63 bits": (blob({"a": entry(0, 0, [1 << 63, 0])}), "'a' has the shape"),
    "product over 64 bits": (blob({"a": entry(0, 0, [1 << 32, 1 << 32])}), "takes 18446744073709551616"),
    "seventeen sizes": (blob({"a": entry(0, 1, [1] * 17)}, b"\0"), "not up to 16 sizes"),
    "three offsets": (blob({"a": entry(0, 1, [1]) | {"data_offsets": [0, 1, 2]}}, b"\0"), "not a start and an end"),
    "negative offset": (blob({"a": entry(-1, 0, [1])}), r"data_offsets \[-1, 0\]"),
    "offset no integer": (blob({"a": entry(0, 1, [1]) | {"data_offsets": [0, "1"]}}, b"\0"), "not a start and an end"),
    "shape against size": (blob({"a": entry(0, 4, [3])}, b"\0" * 4), r"spans bytes 0 to 4, but U8 \[3\] takes 3"),
    "end before start": (blob({"a": entry(4, 0, [0])}), "spans bytes 4 to 0"),
    "hole at the start": (blob({"a": entry(1, 2, [1])}, b"\0" * 2), "a hole before tensor 'a'"),
    "hole": (blob({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"\0" * 3), "a hole before tensor 'b'"),
    "overlap": (blob({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, b"\0" * 3), "an overlap at tensor 'b'"),
    "same bytes twice": (blob({"a": entry(0, 2, [2]), "b": entry(0, 2, [2])}, b"\0" * 2), "an overlap at tensor 'b'"),
    "truncated": (blob(GOOD, b"\0" * 7), "truncated"),
    "trailing": (blob(GOOD, b"\0" * 9), "followed by bytes of no tensor"),
    "trailing without tensors": (blob({}, b"\0"), "followed by bytes of no tensor"),
}


def parse(path: Path, content: bytes) -> SafetensorsHeader:
    path.write_bytes(content)
    file = PositionalFile(path)
    try:
        return read_header(file)
    finally:
        file.close()


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case: str, tmp_path: Path) -> None:
    content, message = MALFORMED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(tmp_path / "bad.safetensors", content)
    assert "bad.safetensors" in str(caught.value)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert safetensors_header.MAX_TENSORS == 200_000
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 3)
    three = {str(i): entry(0, 0, [0]) for i in range(3)}
    assert len(parse(tmp_path / "three", blob(three)).tensors) == 3
    with pytest.raises(CheckpointError, match="4 tensors, more than the 3 allowed"):
        parse(tmp_path / "four", blob(three | {"3": entry(0, 0, [0])}))


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    made = {name: torch.zeros(3, 5).to(dtype) for name, dtype in DTYPES.items()}
    made |= {"scalar": torch.zeros(()), "empty": torch.zeros(0, 4)}
    save_file(made, tmp_path / "all.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "all.safetensors").read_bytes()
    header = parse(tmp_path / "copy", content)
    found = {tensor.name: tensor for tensor in header.tensors}
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert found[name].nbytes == tensor.nbytes


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    content = save({"x": torch.arange(4, dtype=torch.uint8) + 65})
    (tensor,) = parse(tmp_path / "x", content).tensors
    assert content[tensor.offset : tensor.offset + tensor.nbytes] == b"ABCD"


def survives(folder: Path, content: bytes) -> None:
    """The parser either refuses with CheckpointError, or its tensors fill the file behind the header."""
    try:
        header = parse(folder / "fuzz", content)
    except CheckpointError:
        return
    end = 8 + int.from_bytes(content[:8], "little")
    for tensor in header.tensors:
        assert tensor.offset == end
        assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        end += tensor.nbytes
    assert end == len(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=64))
def test_any_bytes_open_or_are_refused(folder: Path, content: bytes) -> None:
    survives(folder, content)
    survives(folder, blob(content))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_mutation_opens_or_is_refused(folder: Path, data: st.DataObject) -> None:
    content = bytearray(blob(GOOD | {"__metadata__": {"format": "pt"}}, b"\0" * 8))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(start + 3, len(content))))
        content[start:stop] = data.draw(st.binary(max_size=3))
    survives(folder, bytes(content))


SIZES = st.lists(st.sampled_from([-1, 0, 1, 2, 4, 8, 1 << 62, 1 << 64, 1.0, True, None, "1", []]), max_size=4)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["U8", "BF16", "I64", "?", 1, None]), "shape": SIZES, "data_offsets": SIZES}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(header=st.dictionaries(st.text(max_size=2) | st.just("__metadata__"), ENTRIES | JSON, max_size=4))
def test_any_json_opens_or_is_refused(folder: Path, header: dict[str, Any]) -> None:
    survives(folder, blob(json.dumps(header).encode(), b"\0" * 8))
