"""Writes files so that they are whole or as they were before, also if the disk is full or the process is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from duoserve.errors import DuoServeError

_LOCK_FILE = ".lock"


@contextmanager
def refused_as(kind: type[DuoServeError], what: str, remedy: str = "") -> Iterator[None]:
    """Raises ``kind`` for an OSError inside; the message has ``what``, the system's reason and the ``remedy``."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what} ({error}){remedy}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Replaces what is at ``path`` by a file with ``data``; raises OSError if that is impossible."""
    with scratch_folder(path.parent, ".writing-") as scratch:
        written = scratch / path.name
        written.write_bytes(data)
        written.replace(path)


def check_writable(path: Path) -> None:
    """Raises the OSError that ``write_whole`` would, before there is anything to write; leaves ``path`` as it is."""
    with scratch_folder(path.parent, ".writing-"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder in ``parent`` for a file that is not whole yet; it is removed when the block ends.

    Folders of the same ``prefix`` that killed processes have left in ``parent`` are removed too.
    """
    remove_left(parent, prefix)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as name:
        folder = Path(name)
        with (folder / "locking").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "locking").rename(folder / _LOCK_FILE)  # renamed only now: by this name it is always locked
            yield folder


def remove_left(parent: Path, prefix: str) -> None:
    """Removes the scratch folders of killed processes; ``prefix`` may name folders above them: ``*/.writing-``."""
    for path in parent.glob(f"{prefix}*/{_LOCK_FILE}"):
        with suppress(OSError), path.open("rb+") as lock:  # OSError: its process runs, or it belongs to another user
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)
