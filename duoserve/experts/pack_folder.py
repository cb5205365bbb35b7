"""The folder of a pack: where it is, whether what is in it is good, and whether this process may write there."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duoserve.errors import CheckpointError
from duoserve.experts.checkpoint import Checkpoint
from duoserve.experts.layout import ExpertLayout
from duoserve.experts.pack_format import HEADER_FILE, PACK_FILE, PackHeader, read_pack_header

LOCK_FILE, SCRATCH = ".lock", ".packing-"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, or ``$DUOSERVE_CACHE``, or ``~/.cache/duoserve``; CheckpointError if there is no home."""
    given = cache_dir or os.environ.get("DUOSERVE_CACHE")
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "duoserve"
    except RuntimeError as error:
        raise CheckpointError("no home directory: set DUOSERVE_CACHE, or give cache_dir") from error


def pack_path(checkpoint: Checkpoint, layout: ExpertLayout, cache_dir: str | Path | None = None) -> Path:
    """The folder for a checkpoint's pack, which need not exist: ``<cache>/packs/<fingerprint>-<layout>``.

    See cache_folder for the cache, and errors.
    """
    return cache_folder(cache_dir) / "packs" / f"{checkpoint.fingerprint()}-{layout.name}"


def is_current(folder: Path, changed_ns: int) -> bool:
    """Whether a pack is there that is not older than ``changed_ns``, the time of the checkpoint's newest file.

    False also for a folder that may not be read.
    """
    try:
        return (folder / HEADER_FILE).stat().st_mtime_ns >= changed_ns
    except OSError:
        return False


def is_out_of_reach(folder: Path) -> bool:
    """Whether a pack is there that this process may not replace, as in a cache that many share."""
    return is_current(folder, 0) and not os.access(folder, os.W_OK)


def is_packed(folder: Path, header: PackHeader, changed_ns: int = 0) -> bool:
    """Whether a pack is there that is whole, has that header, and is current; False also if it may not be read."""
    try:
        whole = read_pack_header(folder) == header and (folder / PACK_FILE).stat().st_size == header.total_bytes
    except (CheckpointError, OSError):
        return False
    return whole and is_current(folder, changed_ns)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps all others from writing in the folder; waits, and says so on stderr, while another does."""
    with (folder / LOCK_FILE).open("wb") as lock:  # held until the file is closed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: another process is packing there: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish(scratch: Path, folder: Path, made_ns: int) -> None:
    """Moves the two files of a finished pack into place; processes that read the old one go on reading it.

    ``made_ns`` becomes the time of the header: the pack is of the checkpoint as it was then.
    """
    os.utime(scratch / HEADER_FILE, ns=(made_ns, made_ns))
    (folder / HEADER_FILE).unlink(missing_ok=True)  # a crash in between may leave no header, never a wrong one
    (scratch / PACK_FILE).replace(folder / PACK_FILE)
    (scratch / HEADER_FILE).replace(folder / HEADER_FILE)
    _sync_folder(folder)


def say(words: str) -> None:
    """Prints one line on stderr that says why packing takes its time."""
    print(f"duoserve: {words}", file=sys.stderr, flush=True)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
