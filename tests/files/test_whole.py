"""Files that are replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from duoserve.files.whole import write_whole


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write_bytes = tmp_path / "file", Path.write_bytes
    write_whole(path, b"before")

    def breaks_off(target: Path, data: bytes) -> None:
        write_bytes(target, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", breaks_off)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_others_may_read_it_as_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "whole", b"one")
    (tmp_path / "plain").write_bytes(b"two")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
