"""One memory limit for several engines, by a control group of Linux, page cache and all.

A process joins when its interpreter and libraries are loaded, and what it holds by then is not counted. So the limit is
on what a model takes: weights, caches, buffers, and the cached pages of the files that are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Hierarchy(NamedTuple):
    """Where groups are made, and what limits them; ``and_swap`` must not be raised above it, where it exists."""

    root: Path
    limit: str
    and_swap: str
    swap_value: str | None  # None: the limit itself, as memory and swap are counted together


HIERARCHIES = (
    Hierarchy(Path("/sys/fs/cgroup"), "memory.max", "memory.swap.max", "0"),
    Hierarchy(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", None),
)


@contextmanager
def memory_cap(limit_bytes: int) -> Iterator[Path | None]:
    """A group with that limit, removed in the end; None where this process may not make one.

    All processes in it must have ended by then.
    """
    group = next((made for one in HIERARCHIES if (made := _group(one, limit_bytes))), None)
    try:
        yield group
    finally:
        if group:
            group.rmdir()


def join(group: Path) -> None:
    """Puts this process, all its threads, into the group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def events(group: Path) -> dict[str, int]:
    """The group's peak in bytes."""
    peak = next(file for name in ("memory.peak", "memory.max_usage_in_bytes") if (file := group / name).exists())
    return {"peak": int(peak.read_text())}


def _group(hierarchy: Hierarchy, limit_bytes: int) -> Path | None:
    group = hierarchy.root / f"duoserve-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        _set(group / hierarchy.limit, limit_bytes)
        if (swap := group / hierarchy.and_swap).exists():
            _set(swap, hierarchy.swap_value or limit_bytes)
    except OSError:
        group.rmdir()
        return None
    return group


def _set(file: Path, value: int | str) -> None:
    """Writes to a file of the kernel's: one that does not exist is not made."""
    with file.open("r+") as opened:
        opened.write(str(value))
