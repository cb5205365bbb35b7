"""JSON from untrusted files: a size cap, no key twice, one object at the top."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from duoserve.errors import CheckpointError
from duoserve.files.positional import read_capped


def parse_object(data: bytes, where: Path) -> dict[str, Any]:
    """The JSON object in ``data``, which came from the file ``where``; raises CheckpointError for anything else."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a key twice, a number too long
        raise CheckpointError(f"{where}: not valid JSON ({error}); download or save the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__} where an object is needed")
    return value


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the file ``path``; raises CheckpointError also if the file exceeds ``max_bytes``."""
    return parse_object(read_capped(path, max_bytes), path)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands {times} times in one object")
    return found
