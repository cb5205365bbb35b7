"""Files that are there whole or as they were before, also when the disk is full or the process is killed."""

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
    """``kind`` where the system refuses something inside; it says ``what``, the system's reason, and the ``remedy``."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what} ({error}){remedy}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Puts a file with ``data`` in place of what is at ``path``; OSError where that cannot be."""
    with scratch_folder(path.parent, ".writing-") as scratch:
        written = scratch / path.name
        written.write_bytes(data)
        written.replace(path)


def check_writable(path: Path) -> None:
    """The OSError of ``write_whole``, before there is anything to write; what is at ``path`` stays as it is."""
    with scratch_folder(path.parent, ".writing-"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder in ``parent`` for a file that is not whole yet, gone when the block ends.

    Those of ``prefix`` that killed processes have left there are removed.
    """
    remove_left(parent, prefix)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as name:
        folder = Path(name)
        with (folder / "locking").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "locking").rename(folder / _LOCK_FILE)  # by this name it is never without its lock
            yield folder


def remove_left(parent: Path, prefix: str) -> None:
    """Removes the scratch folders of killed processes; ``prefix`` may lead through folders: ``*/.writing-``."""
    for path in parent.glob(f"{prefix}*/{_LOCK_FILE}"):
        with suppress(OSError), path.open("rb+") as lock:  # OSError: its process lives, or it is another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)
