"""One memory limit for several engines, by a control group of Linux, page cache and all.

A process joins when its interpreter and libraries are loaded, and what it holds by then is not counted. So the limit is
on what a model takes: weights, caches, buffers, and the cached pages of the files that are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Hierarchy(NamedTuple):
    """Where groups are made and by which files they are limited; ``controls`` exists where it is this one.

    ``swap_value`` None: memory and swap are counted together, and limited alike.
    """

    root: Path
    controls: str
    limit: str
    and_swap: str
    swap_value: int | None


HIERARCHIES = (
    Hierarchy(Path("/sys/fs/cgroup"), "cgroup.subtree_control", "memory.max", "memory.swap.max", 0),
    Hierarchy(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        None,
    ),
)


@contextmanager
def memory_cap(name: str, limit_bytes: int) -> Iterator[Path]:
    """A group with that limit, removed in the end, when all processes in it must have ended.

    OSError where this process may not make one.
    """
    group = _group(f"duoserve-bench-{os.getpid()}-{re.sub('[^a-z0-9]+', '-', name)}", limit_bytes)
    try:
        yield group
    finally:
        group.rmdir()


def can_cap() -> bool:
    """Whether this process may make groups."""
    try:
        with memory_cap("try", 1 << 30):
            return True
    except OSError:
        return False


def join(group: Path) -> None:
    """Puts this process, all its threads, into the group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def leave(group: Path) -> None:
    """Takes this process out again: what it takes from now on is not limited."""
    join(group.parent)


def _group(name: str, limit_bytes: int) -> Path:
    """In the hierarchy that has control of memory."""
    hierarchy = next((one for one in HIERARCHIES if (one.root / one.controls).exists()), None)
    if hierarchy is None:
        raise OSError("no control groups of memory here")
    group = hierarchy.root / name
    group.mkdir()
    try:
        _set(group / hierarchy.limit, limit_bytes)
        if (swap := group / hierarchy.and_swap).exists():
            _set(swap, limit_bytes if hierarchy.swap_value is None else hierarchy.swap_value)
    except OSError:
        group.rmdir()
        raise
    return group


def _set(file: Path, value: int) -> None:
    """Writes to a file of the kernel's: one that does not exist is not made."""
    with file.open("r+") as opened:
        opened.write(str(value))
