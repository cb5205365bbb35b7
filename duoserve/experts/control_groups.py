"""The control groups that limit what this process may take of the machine, as in a container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")


def own_groups(controller: str, proc: Path = PROC, groups: Path = GROUPS) -> Iterator[tuple[Path, int]]:
    """The folder of each group whose ``controller`` limits this process, and the version of its files (1 or 2).

    These are its own group and all around it, as far as they can be seen from here; none where nothing can be read.
    """
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top, version = (groups / controller, 1) if controllers else (groups, 2)
            own = top / path.lstrip("/")
            yield from ((folder, version) for folder in (own, *own.parents) if folder.is_relative_to(top))
