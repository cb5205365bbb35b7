"""What a model asks of memory: the plan that loading and planning share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from duoserve.architecture import LatentAttentionConfig
from duoserve.config import EngineConfig, ModelConfig
from duoserve.experts.budget import FreeMemory, MemoryPlan, plan_memory
from duoserve.experts.layout import ExpertLayout
from duoserve.kernels.limits import MAX_EXPERTS, MAX_HEAD_DIM, MAX_LATENT_DIM, MAX_NORMED, MAX_ROTATED_DIM
from duoserve.kv_cache import PagedKVCache, kv_bytes_per_token
from duoserve.workspace import workspace_bytes

# A context worth having by default; a model's own maximum may cost more memory than its experts.
DEFAULT_MAX_CONTEXT = 4096


@dataclass(frozen=True)
class MemoryNeeds:
    """A model in ``dtype`` on ``device``, its experts' rows and dense weights, and the tokens of its KV cache."""

    config: ModelConfig
    layout: ExpertLayout
    dense_bytes: int
    dtype: torch.dtype
    device: torch.device
    max_context: int

    def plan(self, wanted: EngineConfig, free: FreeMemory, needs_all: bool = False, keeps: bool = True) -> MemoryPlan:
        """How memory is divided, ``needs_all`` and ``keeps`` as in plan_memory; MemoryBudgetError: it cannot work."""
        config, context = self.config, PagedKVCache.whole_pages(self.max_context)
        return plan_memory(
            layout=self.layout,
            num_layers=len(config.moe_layers),
            num_experts=config.num_experts,
            top_k=config.top_k,
            dense_bytes=self.dense_bytes,
            kv_bytes=context * kv_bytes_per_token(config, self.dtype),
            workspace_bytes=workspace_bytes(
                config, self.dtype, self.device, context, compiled=wanted.decode_mode == "compiled"
            ),
            wanted=wanted,
            free=free,
            needs_all=needs_all,
            keeps=keeps,
        )


def context_of(config: ModelConfig, wanted: int | None) -> int:
    """The tokens that the KV cache holds where nobody, or somebody, said how many."""
    return wanted or min(config.num_positions, DEFAULT_MAX_CONTEXT)


def cpu_only(config: ModelConfig) -> str | None:
    """What of the model no kernel for GPUs has yet; None where there is nothing."""
    if config.quantization is not None and config.quantization.ordered:
        return str(config.quantization)
    for name, number, most in _bounded_sizes(config):
        if number > most:
            return f"a model whose {name} is {number} (a GPU takes up to {most})"
    return None


def _bounded_sizes(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """The sizes that kernels for GPUs have a bound on: name, number and bound."""
    yield "hidden size", config.hidden_size, MAX_NORMED
    yield "number of experts", config.num_experts, MAX_EXPERTS
    attention = config.blocks.attention
    if isinstance(attention, LatentAttentionConfig):
        yield "rank of queries", attention.query_rank or 0, MAX_NORMED
        yield "rank of keys and values", attention.latent_dim, MAX_LATENT_DIM
        yield "number of rotated dimensions", attention.rope_dim, MAX_ROTATED_DIM
    else:
        yield "head dimension", attention.head_dim, MAX_HEAD_DIM
