"""The routing plan: which rows go to which expert and where the experts are, as plain data on the device.

T tokens, K top-k, E experts, R = T * K routed rows, W = E entries of a work list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Work(Protocol):
    """The experts that one launch computes, and the slots that they are in.

    ``experts_W`` and ``slots_W`` (int32) have ``count_1`` (int32 [1], on the device) entries, followed by -1. Experts
    ascend. A slot of -1 means that the expert is in no slot: only ops that say so take it.
    """

    @property
    def experts_W(self) -> Tensor: ...

    @property
    def slots_W(self) -> Tensor: ...

    @property
    def count_1(self) -> Tensor: ...

    def pairs(self) -> Sequence[tuple[int, int]]:
        """The (expert, slot) pairs on the host. Waits for the device unless the host has made the list."""
        ...


@dataclass(frozen=True)
class DeviceWork:
    """A work list that the device has made."""

    experts_W: Tensor
    slots_W: Tensor
    count_1: Tensor

    def pairs(self) -> Sequence[tuple[int, int]]:
        count = int(self.count_1)
        return list(zip(self.experts_W[:count].tolist(), self.slots_W[:count].tolist(), strict=True))


@dataclass(frozen=True)
class HostWork:
    """A work list of ``num_entries`` entries that the host has made; the device gets it when an op reads it there."""

    host_pairs: Sequence[tuple[int, int]]
    num_entries: int
    device: torch.device | str

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]], device: torch.device | str = "cpu") -> HostWork:
        """A list of the (expert, slot) ``pairs``, in ascending order of the experts and without unused entries."""
        sorted_pairs = sorted(pairs)
        return cls(sorted_pairs, len(sorted_pairs), device)

    def pairs(self) -> Sequence[tuple[int, int]]:
        return self.host_pairs

    @property
    def experts_W(self) -> Tensor:
        return self._parts[0]

    @property
    def slots_W(self) -> Tensor:
        return self._parts[1]

    @property
    def count_1(self) -> Tensor:
        return self._parts[2]

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        """Experts, slots and their count, brought in one transfer, for which the host does not wait."""
        unused = [-1] * (self.num_entries - len(self.host_pairs))
        experts, slots = ([*(pair[i] for pair in self.host_pairs), *unused] for i in (0, 1))
        on_gpu = torch.device(self.device).type == "cuda"
        entries = [*experts, *slots, len(self.host_pairs)]
        table = torch.tensor(entries, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        return torch.split_with_sizes(table.to(self.device, non_blocking=True), [self.num_entries, self.num_entries, 1])


@dataclass(frozen=True)
class RoutePlan:
    """The routed rows of one layer, stably sorted by expert.

    ``order_R`` (int32) holds flat positions ``token * K + j``; rows ``starts_E1[e] : starts_E1[e + 1]`` of it belong
    to expert ``e``. Rows from ``starts_E1[E]`` on name no expert (a routed id outside 0..E-1, such as -1 for padding)
    and are computed by no op. ``resident`` and ``missing`` list the experts that have rows, by whether they had a slot
    when the plan was made; ``top_k`` is K.
    """

    order_R: Tensor
    starts_E1: Tensor
    resident: Work
    missing: Work
    top_k: int

    @cached_property
    def starts(self) -> list[int]:
        """``starts_E1`` on the host. Waits for the device once."""
        starts: list[int] = self.starts_E1.tolist()
        return starts

    @cached_property
    def order(self) -> list[int]:
        """``order_R`` on the host. Waits for the device once."""
        order: list[int] = self.order_R.tolist()
        return order

    @cached_property
    def places_R(self) -> Tensor:
        """``order_R`` in int64."""
        return self.order_R.long()

    @cached_property
    def tokens_R(self) -> Tensor:
        """The tokens of the sorted rows (int64)."""
        return self.places_R // self.top_k

    def rows(self, expert: int) -> tuple[int, int]:
        """The half-open range of sorted rows that belong to ``expert``, read on the host."""
        return self.starts[expert], self.starts[expert + 1]

    def num_rows(self) -> dict[int, int]:
        """The number of rows of each expert that has any, read on the host."""
        spans = enumerate(zip(self.starts, self.starts[1:], strict=False))
        return {expert: stop - start for expert, (start, stop) in spans if stop > start}


def by_demand(rows: Mapping[int, int]) -> list[int]:
    """The experts of ``rows``, the one with the most rows first; ties are in the order of their ids."""
    return sorted(rows, key=lambda expert: (-rows[expert], expert))
