"""What a model asks of memory: the plan that loading and planning share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duoserve.config import EngineConfig, ModelConfig
from duoserve.experts.budget import Footprint, FreeMemory, MemoryPlan, plan_memory
from duoserve.experts.layout import ExpertLayout
from duoserve.kv_cache import PagedKVCache, kv_bytes_per_token
from duoserve.loading.workspace import workspace_bytes

# A context worth having by default; a model's own maximum may cost more memory than its experts.
DEFAULT_MAX_CONTEXT = 4096


@dataclass(frozen=True)
class MemoryNeeds:
    """All that decides how many bytes a model takes.

    Its experts' rows have ``layout``, its other weights take ``dense_bytes`` in ``dtype``, and its KV cache holds
    ``max_context`` tokens. It is computed on ``device``.
    """

    config: ModelConfig
    layout: ExpertLayout
    dense_bytes: int
    dtype: torch.dtype
    device: torch.device
    max_context: int

    def plan(self, wanted: EngineConfig, free: FreeMemory, needs_all: bool = False, keeps: bool = True) -> MemoryPlan:
        """How memory is divided, ``needs_all`` and ``keeps`` as in plan_memory; MemoryBudgetError if it cannot work."""
        return plan_memory(
            self._footprint(wanted.decode_mode == "compiled"), wanted, free, needs_all=needs_all, keeps=keeps
        )

    def _footprint(self, compiled: bool) -> Footprint:
        config, context = self.config, PagedKVCache.whole_pages(self.max_context)
        return Footprint(
            num_layers=len(config.moe_layers),
            num_experts=config.num_experts,
            top_k=config.top_k,
            slot_bytes=self.layout.slot_bytes,
            dense_bytes=self.dense_bytes,
            kv_bytes=context * kv_bytes_per_token(config, self.dtype),
            workspace_bytes=workspace_bytes(config, self.dtype, self.device, context, compiled=compiled),
        )


def context_of(config: ModelConfig, wanted: int | None) -> int:
    """The tokens that the KV cache holds: ``wanted``, else all positions of the model up to DEFAULT_MAX_CONTEXT."""
    return wanted or min(config.num_positions, DEFAULT_MAX_CONTEXT)
