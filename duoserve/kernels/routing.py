"""The routing plan: which rows go to which expert, as plain data that every kernel of a layer reads.

T tokens, K top-k, E experts, N = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutePlan:
    """The routed rows of one layer, stably sorted by expert.

    ``order_N`` (int64) holds flat positions ``token * K + j``: rows ``starts[g] : starts[g + 1]`` of it belong to
    ``experts[g]``, whose ids ascend. ``top_k`` is K.
    """

    order_N: Tensor
    experts: tuple[int, ...]
    starts: tuple[int, ...]
    top_k: int

    def rows(self, expert: int) -> tuple[int, int]:
        """The half-open range of sorted rows that belong to ``expert``; raises ValueError when it has none."""
        group = self.experts.index(expert)
        return self.starts[group], self.starts[group + 1]

    def by_demand(self) -> list[int]:
        """The experts, those with most rows first; ties in order of their ids."""
        counts = [stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)]
        return [expert for _, expert in sorted(zip(counts, self.experts, strict=True), key=lambda ce: (-ce[0], ce[1]))]
