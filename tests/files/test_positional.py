"""Files that are cut short, rewritten or fail under us: errors, never a crash and never wrong weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duoserve.errors import CheckpointError
from duoserve.experts.checkpoint import Checkpoint
from duoserve.files import positional
from duoserve.files.positional import PositionalFile
from tests.experts.safetensors_files import SINGLE, single_file, write_bytes_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return single_file(tmp_path)


def test_reads_go_on_after_a_short_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:3]], offset))
    checkpoint = Checkpoint.open(folder)
    assert bytes(checkpoint.read("x").tolist()) == b"abcd"
    checkpoint.close()


def test_a_pipe_is_refused_and_does_not_hang(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is not a regular file"):
        Checkpoint.open(folder)


def test_a_file_truncated_after_opening_is_an_error(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / SINGLE, 10)
    with pytest.raises(CheckpointError, match=r"changed after it was opened \(.* bytes then, 10 now\).*\[tensor 'x'\]"):
        checkpoint.read("x")
    checkpoint.close()


def test_a_file_rewritten_after_opening_is_an_error(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    write_bytes_tensors(folder / SINGLE, x=b"evil")
    os.utime(folder / SINGLE, ns=(0, 1))
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        checkpoint.read("x")
    checkpoint.close()


def test_a_short_read_is_an_error(folder: Path) -> None:
    file = PositionalFile(folder / SINGLE)
    with pytest.raises(CheckpointError, match=f"ends after 2 of the 6 bytes wanted at byte {file.size - 2}; .*again"):
        file.read(file.size - 2, 6)
    file.close()


def test_an_error_of_the_disk_names_file_and_offset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    checkpoint = Checkpoint.open(folder)
    monkeypatch.setattr(os, "preadv", fails)
    offset = checkpoint.tensors["x"].offset
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: reading at byte {offset} failed .*Input/output error"):
        checkpoint.read("x")
    checkpoint.close()


@pytest.mark.parametrize("most", [1, 3, 4, 7, 1 << 20])
def test_rows_are_read_to_where_they_belong(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one call takes, in a file that gives a few bytes at a time."""
    count = positional.MAX_BUFFERS + 3
    data = np.arange(4 * count, dtype=np.uint32).astype(np.uint8)
    (tmp_path / "file").write_bytes(b"ab" + data.tobytes())
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:most]] if most < len(buffers[0]) else buffers[: most // len(buffers[0])], offset)

    monkeypatch.setattr(os, "preadv", short)
    wide = np.zeros((count, 2, 4), dtype=np.uint8)
    file = PositionalFile(tmp_path / "file")
    file.read_rows(wide[:, 1], 2)
    assert (wide[:, 1].reshape(-1) == data).all() and not wide[:, 0].any()
    with pytest.raises(CheckpointError, match="ends after 3 of the 4 bytes wanted"):
        file.read_rows(wide[:, 1], 3)
    file.close()
