"""The dense tensors of a checkpoint, as blocks ask for them: by name and shape.

The code that loads a model also says which tensors it needs, in a dry run with a reader that only takes notes. So a
model uses exactly the tensors that its checkpoint is checked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ReadTensor(Protocol):
    """Reads a tensor by its name in the checkpoint."""

    def __call__(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in ``dtype``, or in the model's dtype if that is None."""


class TensorNeed(NamedTuple):
    """The shape and dtype that a model needs a tensor in; ``dtype`` None: the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Tensors:
    """The tensors whose names begin with ``prefix``; ``get(name, need)`` reads one."""

    get: Callable[[str, TensorNeed], Tensor]
    prefix: str = ""

    @classmethod
    def of(cls, read: ReadTensor) -> Tensors:
        """The tensors of a checkpoint, whose shapes must have been checked."""
        return cls(lambda name, need: read(name, need.dtype))

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor ``prefix + name``, which has this shape."""
        return self.get(self.prefix + name, TensorNeed(shape, dtype))

    def under(self, name: str) -> Tensors:
        """The tensors whose names go on with ``name``."""
        return Tensors(self.get, f"{self.prefix}{name}.")


def needs_of(load: Callable[[Tensors], object]) -> dict[str, TensorNeed]:
    """Every tensor that ``load`` asks for, by name; none is read."""
    needs: dict[str, TensorNeed] = {}

    def note(name: str, need: TensorNeed) -> Tensor:
        needs[name] = need
        return torch.empty(need.shape, dtype=need.dtype, device="meta")

    load(Tensors(note))
    return needs
