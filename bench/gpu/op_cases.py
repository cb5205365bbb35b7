"""What the timed ops of a decode step have in common: their operands' source, and what a case consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu.moe_operands import L2_MULTIPLE
from gpu.moe_paths import ROUNDING_ERROR, Check, relative_error
from gpu.timing import Work


@dataclass(frozen=True)
class OpCase:
    """One op: its ``steps`` in rotation, the bytes that one moves, how it is checked, and others that do the same."""

    name: str
    steps: list[Work]
    nbytes: float
    check: Callable[[], Check]
    peers: dict[str, list[Work]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where operands live, and the size of the cache that rotation has to pass."""

    device: str
    l2_bytes: int

    def random(self, *shape: int) -> Tensor:
        """Normal bf16 numbers."""
        return torch.randn(shape, device=self.device).bfloat16()

    def rotation(self, step_bytes: float) -> int:
        """How many sets of operands of ``step_bytes`` pass the cache."""
        return max(2, int(-(-L2_MULTIPLE * self.l2_bytes // step_bytes)))


def close(name: str, ours: Tensor, true: Tensor, roundings: int) -> Check:
    """``roundings`` to bf16 lie between ``ours`` and ``true``."""
    return Check(name, relative_error(ours, true), roundings * ROUNDING_ERROR)
