"""How much RAM this process may still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from duoserve.experts.control_groups import GROUPS, PROC, own_groups


class GroupFiles(NamedTuple):
    """What a control group says of its memory: the files' names, and how the entries of its page cache begin.

    The kernel ends processes of a group that has more than ``memory.max``, and stops those above ``memory.high`` until
    memory has been given back.
    """

    limits: tuple[str, ...]
    used: str
    prefix: str


FILES = {
    1: GroupFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    2: GroupFiles(("memory.max", "memory.high"), "memory.current", ""),
}


def available_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Bytes the kernel calls available, or what the limits of control groups leave, whichever is least."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, version in own_groups("memory", proc, groups):
        files = FILES[version]
        for limit in files.limits:
            with suppress(OSError, ValueError):  # ValueError: the limit is "max", which is none
                available = min(available, int((folder / limit).read_text()) - _kept(folder, files))
    return max(0, available)


def _kept(folder: Path, files: GroupFiles) -> int:
    """What a group has and keeps: page cache of files is given back before memory is refused."""
    return int((folder / files.used).read_text()) - _page_cache(folder, files)


def _page_cache(folder: Path, files: GroupFiles) -> int:
    with suppress(OSError, ValueError):
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(entries.get(f"{files.prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return 0
