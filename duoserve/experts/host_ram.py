"""How much RAM this process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")


class GroupFiles(NamedTuple):
    """What a control group says of its memory: the files' names, and how the entries of its page cache begin."""

    limit: str
    used: str
    prefix: str


V1 = GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = GroupFiles("memory.max", "memory.current", "")


def available_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Bytes the kernel calls available, or what the limits of control groups leave, whichever is least."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, files in _own_groups(proc, groups):
        with suppress(OSError, ValueError):  # ValueError: the limit is "max", which is none
            available = min(available, _left(folder, files))
    return max(0, available)


def _own_groups(proc: Path, groups: Path) -> Iterator[tuple[Path, GroupFiles]]:
    """The groups that limit this process: its own and all around them, as far as they can be seen from here."""
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, files = (groups / "memory", V1) if controllers else (groups, V2)
            own = top / path.lstrip("/")
            yield from ((folder, files) for folder in (own, *own.parents) if folder.is_relative_to(top))


def _left(folder: Path, files: GroupFiles) -> int:
    """What a group may still take: page cache of files is given back before that fails."""
    limit, used = int((folder / files.limit).read_text()), int((folder / files.used).read_text())
    return limit - used + _page_cache(folder, files)


def _page_cache(folder: Path, files: GroupFiles) -> int:
    with suppress(OSError, ValueError):
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(entries.get(f"{files.prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return 0
