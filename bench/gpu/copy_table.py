"""What a link does with pieces of every size, each way: the rates that all other figures are held against.

The table is made by whatever can copy (``CopyMachine``), so its logic is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Protocol

from duoserve.experts.tickets import PIECE_BYTES
from gpu.moe_shapes import DEEPSEEK, MIXTRAL, QWEN3
from harness import Summary, Target

Result = dict[str, Any]


class Way(Enum):
    """How bytes go from one memory to another."""

    TO_DEVICE = "to the device, pinned"
    FROM_DEVICE = "from the device, pinned"
    TO_DEVICE_PAGEABLE = "to the device, pageable"
    FROM_DEVICE_PAGEABLE = "from the device, pageable"
    ZERO_COPY = "read by a kernel (page_gather)"


EXPERTS = {f"{shape.name} expert, bf16": shape.layout("bf16").slot_bytes for shape in (QWEN3, DEEPSEEK, MIXTRAL)}
PIECES = {f"{nbytes >> 10} KiB": nbytes for nbytes in (4 << 10, 64 << 10, 256 << 10, 1 << 20)}
PIECE = "8 MiB, a piece of a prefetch"
SIZES = {**PIECES, PIECE: PIECE_BYTES, **EXPERTS}
TINY_SIZES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10}
PIECE_SHARE = 0.95  # of the best rate, below which prefetching in pieces costs the link
ZERO_COPY_SHARE = 0.85  # of the copy rate, from where on reading through costs less than copying first


class CopyMachine(Protocol):
    """Something that can copy."""

    def seconds(self, way: Way, nbytes: int) -> list[float]:
        """Seconds that one copy of ``nbytes`` took, for each round."""
        ...

    def arrives(self, way: Way, nbytes: int) -> bool:
        """Whether random bytes that go this way come out as they went in."""
        ...


@dataclass(frozen=True)
class Cell:
    """The rate of one way at one size; ``error`` says why there is none."""

    way: str
    size: str
    nbytes: int
    rounds_s: list[float]
    error: str | None = None

    @property
    def bytes_per_s(self) -> Summary | None:
        """Over the rounds."""
        return Summary.of([self.nbytes / s for s in self.rounds_s]) if self.rounds_s else None

    def to_dict(self) -> Result:
        """Everything, for the result file."""
        return asdict(self) | {"bytes_per_s": self.bytes_per_s and asdict(self.bytes_per_s)}


def measure(machine: CopyMachine, sizes: dict[str, int], save: Callable[[Result], None]) -> Result:
    """``cells`` (a failure is one without rounds), ``checks`` and ``ceilings``; ``save`` gets them after each way."""
    cells: list[Cell] = []
    checks: list[Result] = []
    for way in Way:
        checks.append(_check(machine, way, max(sizes.values())))
        cells += [_cell(machine, way, size, nbytes) for size, nbytes in sizes.items()]
        result = {"cells": [cell.to_dict() for cell in cells], "checks": checks, "ceilings": ceilings(cells)}
        save(result)
    return result


def _cell(machine: CopyMachine, way: Way, size: str, nbytes: int) -> Cell:
    try:
        return Cell(way.value, size, nbytes, machine.seconds(way, nbytes))
    except Exception as error:
        return Cell(way.value, size, nbytes, [], _first_line(error))


def _check(machine: CopyMachine, way: Way, nbytes: int) -> Result:
    name = f"bytes {way.value}"
    try:
        return {"name": name, "passed": machine.arrives(way, nbytes), "detail": f"{nbytes} random bytes"}
    except Exception as error:
        return {"name": name, "passed": None, "detail": _first_line(error)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def ceilings(cells: Sequence[Cell]) -> dict[str, float | None]:
    """By way, the best median rate over the sizes, in bytes a second; None where nothing was measured."""
    return {way.value: max((r for c in cells if (r := _rate(c, way)) is not None), default=None) for way in Way}


def targets(result: Result) -> list[Target]:
    """What the runtime's design rests on."""
    rates = {(cell["way"], cell["size"]): cell["bytes_per_s"] for cell in result["cells"]}
    best = result["ceilings"][Way.TO_DEVICE.value]
    found = [_share("8 MiB pieces / best rate", rates.get((Way.TO_DEVICE.value, PIECE)), best, PIECE_SHARE)]
    for size in (size for size in EXPERTS if (Way.ZERO_COPY.value, size) in rates):
        copied = rates[Way.TO_DEVICE.value, size]
        name = f"read by a kernel / copied: {size}"
        found.append(_share(name, rates[Way.ZERO_COPY.value, size], copied and copied["median"], ZERO_COPY_SHARE))
    return found


def _share(name: str, part: Result | None, whole: float | None, limit: float) -> Target:
    value = part["median"] / whole if part and whole else None
    return Target(name, value, limit, at_least=True, unit="x")


def _rate(cell: Cell, way: Way) -> float | None:
    return cell.bytes_per_s.median if cell.way == way.value and cell.bytes_per_s else None
