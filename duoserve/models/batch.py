"""The tokens of one forward pass: new tokens of one or more sequences, laid end to end.

T new tokens of all sequences, B sequences, C context tokens of one (its new ones included), G KV heads, D head
dimension, P pages, S tokens a page, M pages of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class KVStore(Protocol):
    """Keys and values of the batch's sequences: the part of a paged KV cache that attention uses."""

    @property
    def rows_T(self) -> Tensor:
        """The cache row ``page * S + place`` of every new token, int64."""

    @property
    def page_table_BM(self) -> Tensor:
        """The pages of every sequence in order, int32; entries behind a sequence's pages are not read."""

    @property
    def lengths_B(self) -> Tensor:
        """Tokens of context of every sequence, its new ones included, int32."""

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, of all sequences, each [P, S, G, D]; the widths may differ.

        Latent attention keeps one row for all heads as a key, and values of width 0.
        """

    def context(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values [C, G, D] of one sequence of the batch, its new tokens included."""


@dataclass(frozen=True)
class Batch:
    """The new tokens ``token_ids_T`` at ``positions_T`` (both int64); sequence i has ``spans[i]`` (start, stop)."""

    token_ids_T: Tensor
    positions_T: Tensor
    spans: tuple[tuple[int, int], ...]
    kv: KVStore

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token, so that row b belongs to sequence b."""
        return self.token_ids_T.shape[0] == len(self.spans)
