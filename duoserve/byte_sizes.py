"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from duoserve.errors import ConfigError
from duoserve.number_checks import is_integer

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}
SIZE = re.compile(r"\s*(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?I?B|)\s*", re.ASCII | re.IGNORECASE)
MAX_BYTES = 2**63 - 1


def parse_bytes(size: int | str) -> int:
    """The bytes of ``size``: an integer, or text such as "4GiB" (1024s), "500MB" (1000s) or "4096".

    Raises ConfigError for anything else.
    """
    match = SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = UNITS.get(match[2].upper()) if match else None
    if match and unit:
        size = int(Decimal(match[1]) * unit)
    if not is_integer(size) or not 0 <= size <= MAX_BYTES:
        raise ConfigError(
            f"{size!r} is not an amount of memory: give bytes, or text such as '4GiB', '1.5GiB' or '500MB'"
        )
    return int(size)


def format_bytes(nbytes: int) -> str:
    """``nbytes`` for people, in 1024s and to two decimals: "512 B", "1.25 GiB"."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    amount = nbytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"
