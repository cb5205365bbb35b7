"""Made-up files of the kernel, by which a process finds out what it may take of the machine."""

from __future__ import annotations

from pathlib import Path

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def in_no_group(root: Path) -> Path:
    """A machine with 20 GiB available below ``root``, and a process in no group with a limit."""
    write(root / "proc/meminfo", f"MemTotal: {24 << 20} kB\nMemAvailable:   {20 << 20} kB\n")
    write(root / "proc/self/cgroup", "0::/\n")
    return root
