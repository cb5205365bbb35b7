"""Which models the kernels for GPUs can compute."""

from __future__ import annotations

from collections.abc import Iterator

from duoserve.architecture import LatentAttentionConfig
from duoserve.config import ModelConfig
from duoserve.kernels.limits import MAX_EXPERTS, MAX_HEAD_DIM, MAX_LATENT_DIM, MAX_NORMED, MAX_ROTATED_DIM


def cpu_only(config: ModelConfig) -> str | None:
    """Why no GPU can compute the model yet: what the kernels lack; None if they lack nothing."""
    if config.quantization is not None and config.quantization.ordered:
        return str(config.quantization)
    for name, number, most in _bounded_sizes(config):
        if number > most:
            return f"a model whose {name} is {number} (a GPU takes up to {most})"
    return None


def _bounded_sizes(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """The model's sizes that kernels for GPUs bound: name, number and bound."""
    yield "hidden size", config.hidden_size, MAX_NORMED
    yield "number of experts", config.num_experts, MAX_EXPERTS
    attention = config.blocks.attention
    if isinstance(attention, LatentAttentionConfig):
        yield "rank of queries", attention.query_rank or 0, MAX_NORMED
        yield "rank of keys and values", attention.latent_dim, MAX_LATENT_DIM
        yield "number of rotated dimensions", attention.rope_dim, MAX_ROTATED_DIM
    else:
        yield "head dimension", attention.head_dim, MAX_HEAD_DIM
