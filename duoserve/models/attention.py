"""Grouped-query attention over a KV store.

T new tokens, B sequences with one new token each, H query heads, G KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.architecture import AttentionConfig
from duoserve.kernels.small_ops import ON_EVERY_DEVICE, SmallOps
from duoserve.models.batch import Batch
from duoserve.models.layers import Linear, RMSNorm
from duoserve.models.tensors import Tensors


@dataclass(frozen=True)
class GroupedQueryAttention:
    """One projection ``qkv`` makes queries, keys and values: [T, (H + 2G) * D]; ``out`` takes [T, H * D]."""

    layer: int
    config: AttentionConfig
    qkv: Linear
    norms: tuple[RMSNorm, RMSNorm] | None
    sinks_H: Tensor | None
    out: Linear
    ops: SmallOps = ON_EVERY_DEVICE

    @classmethod
    def load(
        cls, layer: int, config: AttentionConfig, hidden: int, eps: float, tensors: Tensors
    ) -> GroupedQueryAttention:
        """Loads it from the projections ``q_proj`` to ``o_proj``, and the norms and sinks that the config names."""
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        widths = (("q", queries), ("k", keys), ("v", keys))
        parts = [(tensors.under(f"{name}_proj"), width) for name, width in widths]
        return cls(
            layer=layer,
            config=config,
            qkv=Linear.load_stacked(parts, hidden, config.qkv_bias),
            norms=_norms(config, eps, tensors),
            sinks_H=tensors("sinks", config.num_heads) if config.sinks else None,
            out=Linear.load(tensors.under("o_proj"), hidden, queries, config.out_bias),
        )

    def __call__(self, x_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        q_THD, k_TGD, v_TGD = self._heads(x_TH)
        q_THD = self.ops.rope_write_kv(q_THD, k_TGD, v_TGD, *rope, *batch.kv.pages(self.layer), batch.kv.rows_T)
        attended_THD = self._attend_one_each(q_THD, batch) if batch.is_decode else self._attend(q_THD, batch)
        return self.out(attended_THD.flatten(1))

    def _heads(self, x_TH: Tensor) -> list[Tensor]:
        """Queries [T, H, D], keys and values [T, G, D], normed and clipped."""
        config = self.config
        parts = list(torch.split(self.qkv(x_TH), [n * config.head_dim for n in self._head_counts], dim=-1))
        for i, norm in enumerate(self.norms or ()):
            parts[i] = norm(parts[i].view(len(x_TH), -1, len(norm.weight_H))).flatten(1)
        if config.clip is not None:
            parts = [part.clamp(-config.clip, config.clip) for part in parts]
        return [part.view(len(x_TH), -1, config.head_dim) for part in parts]

    def _attend_one_each(self, q_BHD: Tensor, batch: Batch) -> Tensor:
        kv = batch.kv
        table, lengths = kv.page_table_BM, kv.lengths_B
        return kernels.decode_attention(
            q_BHD, *kv.pages(self.layer), table, lengths, self.config.scale, self._window, self.sinks_H
        )

    def _attend(self, q_THD: Tensor, batch: Batch) -> Tensor:
        contexts = [batch.kv.context(self.layer, sequence) for sequence in range(len(batch.spans))]
        attended = [
            kernels.attention(q_THD[start:stop], *context, self.config.scale, self._window, self.sinks_H)
            for context, (start, stop) in zip(contexts, batch.spans, strict=True)
        ]
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    @property
    def _head_counts(self) -> tuple[int, int, int]:
        return self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads

    @property
    def _window(self) -> int | None:
        return self.config.windows[self.layer]


def _norms(config: AttentionConfig, eps: float, tensors: Tensors) -> tuple[RMSNorm, RMSNorm] | None:
    """The norms of queries and keys, as wide as a head or as the whole projection."""
    if config.qk_norm is None:
        return None
    heads = (1, 1) if config.qk_norm == "head" else (config.num_heads, config.num_kv_heads)
    q_norm, k_norm = (
        RMSNorm.load(tensors.under(name), count * config.head_dim, eps)
        for name, count in zip(("q_norm", "k_norm"), heads, strict=True)
    )
    return q_norm, k_norm
