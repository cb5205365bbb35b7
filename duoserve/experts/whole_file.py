"""Files that are there whole or as they were before, also when the disk is full or the process dies."""

from __future__ import annotations

import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Puts a file with ``data`` in place of what is at ``path``; OSError where that cannot be."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        written = Path(scratch, path.name)
        written.write_bytes(data)
        written.replace(path)
