"""The tokens of one forward pass: new tokens of one or more sequences, laid end to end.

T new tokens of all sequences, C context tokens of one (its new ones included), G KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class KVStore(Protocol):
    """Keys and values of the batch's sequences: what attention needs of a KV cache."""

    def append(self, layer: int, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Stores the new tokens' keys and values of one layer."""

    def context(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values [C, G, D] of one sequence of the batch, its new tokens included."""


@dataclass(frozen=True)
class Batch:
    """``token_ids_T`` and ``positions_T`` are int64; sequence ``i`` owns the new tokens ``spans[i]`` (start, stop)."""

    token_ids_T: Tensor
    positions_T: Tensor
    spans: tuple[tuple[int, int], ...]
    kv: KVStore

    @property
    def last_rows(self) -> list[int]:
        """The row of each sequence's last new token."""
        return [stop - 1 for _, stop in self.spans]
