"""Which files hold a checkpoint's tensors: an untrusted index, pickled weights, links."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from duoserve.errors import CheckpointError
from duoserve.experts.checkpoint import Checkpoint
from tests.experts.safetensors_files import INDEX, SINGLE, single_file, two_shards, write_bytes_tensors, write_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return single_file(tmp_path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return two_shards(tmp_path)


INDEXES: dict[str, tuple[Any, str]] = {
    "no weight_map": (None, "weight_map must map tensor names to file names"),
    "empty": ({}, "weight_map must map tensor names to file names"),
    "parent": ({"x": "../one.safetensors"}, r"'x' is said to be in '\.\./one\.safetensors', which is no plain file"),
    "absolute": ({"x": "/one.safetensors"}, "no plain file name"),
    "folder": ({"x": "a/one.safetensors"}, "no plain file name"),
    "backslash": ({"x": "..\\one.safetensors"}, "no plain file name"),
    "NUL": ({"x": "one\0.safetensors"}, "no plain file name"),
    "surrogate": ({"x": "\ud800.safetensors"}, "no plain file name"),
    "no text": ({"x": 1}, "no plain file name"),
    "too long": ({"x": "o" * 300 + ".safetensors"}, "cannot be opened .*File name too long"),
    "no safetensors": ({"x": "config.json"}, r"said to be in 'config\.json', which is no \.safetensors file"),
    "dots": ({"x": ".."}, r"said to be in '\.\.', which is no \.safetensors file"),
    "pickle": ({"x": "one.bin"}, r"'x' is in one\.bin: pickled weights are never opened; .*safe_serialization=True"),
    "shard missing": ({"x": "one.safetensors", "y": "three.safetensors"}, r"three\.safetensors: is missing; finish"),
    "tensor missing": (
        {"x": "one.safetensors", "y": "two.safetensors", "z": "two.safetensors"},
        r"two\.safetensors: tensor 'z' is not in it, though model\.safetensors\.index\.json says so; .*download",
    ),
    "wrong shard": ({"x": "two.safetensors", "y": "one.safetensors"}, r"two\.safetensors: tensor 'x' is not in it"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_malformed_index_is_refused(shards: Path, case: str) -> None:
    weight_map, message = INDEXES[case]
    write_index(shards, weight_map)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(shards)


def test_a_tensor_twice_in_the_index_is_refused(shards: Path) -> None:
    (shards / INDEX).write_text('{"weight_map": {"x": "one.safetensors", "x": "two.safetensors"}}')
    with pytest.raises(CheckpointError, match="'x' stands 2 times"):
        Checkpoint.open(shards)


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    write_bytes_tensors(shards / "two.safetensors", y=b"efgh", x=b"evil")
    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor 'x' is in one\.safetensors too"):
        Checkpoint.open(shards)


@pytest.mark.parametrize("module", ["shards", "checkpoint"])
def test_more_tensors_than_allowed_are_refused(shards: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"duoserve.experts.{module}.MAX_TENSORS", 1)
    with pytest.raises(CheckpointError, match=r"\.safetensors.*: .*(2|more) tensors"):
        Checkpoint.open(shards)


def test_shards_may_be_links_out_of_the_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The hub's cache is made of links to ../../blobs/<hash>."""
    blobs = tmp_path_factory.mktemp("blobs")
    for path in list(shards.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, shards))
    checkpoint = Checkpoint.open(shards)
    assert bytes(checkpoint.read("y").tolist()) == b"efgh"
    checkpoint.close()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_with_the_remedy(folder: Path, name: str) -> None:
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"only {name}: .*never opened; .*safe_serialization=True"):
        Checkpoint.open(folder)


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=rf"{folder}: has neither {SINGLE} nor {INDEX}: no weights are there"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "names",
    [["gptq_model-4bit-128g.safetensors"], ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]],
)
def test_weights_of_other_names_are_listed(folder: Path, names: list[str]) -> None:
    """As AutoGPTQ called them, or shards whose index was left behind; pickles beside them are not to be converted."""
    (folder / SINGLE).rename(folder / names[0])
    for name in [*names[1:], "pytorch_model.bin"]:
        (folder / name).touch()
    remedy = rf"one file with all weights must be called {SINGLE}, and several need {INDEX}"
    with pytest.raises(CheckpointError, match=rf"has neither {SINGLE} nor {INDEX}, only {', '.join(names)}: {remedy}"):
        Checkpoint.open(folder)


def open_files() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_a_refused_checkpoint_leaves_no_file_open(shards: Path) -> None:
    (shards / "two.safetensors").write_bytes(b"")
    before = open_files()
    with pytest.raises(CheckpointError, match="too short"):
        Checkpoint.open(shards)
    assert open_files() == before
