"""The routing plan: which rows go to which expert and where the experts are, as plain data on the device.

T tokens, K top-k, E experts, N = T * K routed rows, W = E entries of a work list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """The experts that one launch computes, and the slots that they are in.

    ``experts_W`` and ``slots_W`` (int32) count to ``count_1`` (int32 [1], on the device), the entries after it are -1.
    Experts ascend. A slot of -1 is an expert that is in no slot: only ops that say so take it. ``host_pairs`` are the
    entries where the host has made the list.
    """

    experts_W: Tensor
    slots_W: Tensor
    count_1: Tensor
    host_pairs: Sequence[tuple[int, int]] | None = None

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]], device: torch.device | str = "cpu") -> Work:
        """The work list of (expert, slot) ``pairs`` that the host knows, in ascending order of the experts."""
        sorted_pairs = sorted(pairs)
        return cls.lists([sorted_pairs], len(sorted_pairs), device)[0]

    @classmethod
    def lists(
        cls, works: Sequence[Sequence[tuple[int, int]]], num_entries: int, device: torch.device | str
    ) -> list[Work]:
        """Work lists of ``num_entries`` entries each, from pairs in ascending order of the experts, in one transfer."""
        rows = []
        for pairs in works:
            unused = [-1] * (num_entries - len(pairs))
            rows += [*(expert for expert, _ in pairs), *unused, *(slot for _, slot in pairs), *unused, len(pairs)]
        table = torch.tensor(rows, dtype=torch.int32, device=device)
        parts = iter(torch.split_with_sizes(table, [num_entries, num_entries, 1] * len(works)))
        return [cls(*fields) for fields in zip(parts, parts, parts, works, strict=True)]

    def pairs(self) -> Sequence[tuple[int, int]]:
        """The (expert, slot) pairs on the host. Waits for the device unless the host has made the list."""
        if self.host_pairs is not None:
            return self.host_pairs
        count = int(self.count_1)
        return list(zip(self.experts_W[:count].tolist(), self.slots_W[:count].tolist(), strict=True))


@dataclass(frozen=True)
class RoutePlan:
    """The routed rows of one layer, stably sorted by expert.

    ``order_N`` (int32) holds flat positions ``token * K + j``; rows ``starts_E1[e] : starts_E1[e + 1]`` of it belong
    to expert ``e``. Rows from ``starts_E1[E]`` on name no expert (a routed id outside 0..E-1, such as -1 for padding)
    and are computed by no op. ``resident`` and ``missing`` list the experts that have rows, by whether they had a slot
    when the plan was made; ``top_k`` is K.
    """

    order_N: Tensor
    starts_E1: Tensor
    resident: Work
    missing: Work
    top_k: int

    @cached_property
    def starts(self) -> list[int]:
        """``starts_E1`` on the host. Waits for the device once."""
        starts: list[int] = self.starts_E1.tolist()
        return starts

    def rows(self, expert: int) -> tuple[int, int]:
        """The half-open range of sorted rows that belong to ``expert``, read on the host."""
        return self.starts[expert], self.starts[expert + 1]

    def by_demand(self) -> list[int]:
        """The experts that have rows, those with most first; ties in order of their ids. Read on the host."""
        return by_demand([stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)])


def by_demand(counts_E: Sequence[int]) -> list[int]:
    """The experts that have rows, those with most first; ties in order of their ids."""
    return sorted((e for e, count in enumerate(counts_E) if count), key=lambda e: (-counts_E[e], e))
