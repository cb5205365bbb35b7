"""Grouped-query attention over a KV store.

T new tokens, H query heads, G KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.models.batch import Batch


@dataclass(frozen=True)
class GroupedQueryAttention:
    """``qkv_weight`` stacks the query, key and value projections: [(H + 2G) * D, hidden]; ``o_weight`` is
    [hidden, H * D]. ``window`` counts the positions a token sees, itself included; None is all of them.
    """

    layer: int
    qkv_weight: Tensor
    o_weight: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None

    def __call__(self, x_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        qkv_THD = kernels.linear(x_TH, self.qkv_weight).view(x_TH.shape[0], -1, self.head_dim)
        q_THD, k_TGD, v_TGD = torch.split(qkv_THD, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q_THD = kernels.rope_write_kv(q_THD, k_TGD, v_TGD, *rope, *batch.kv.pages(self.layer), batch.kv.rows_T)
        attended_THD = self._attend_one_each(q_THD, batch) if batch.is_decode else self._attend(q_THD, batch)
        return kernels.linear(attended_THD.flatten(1), self.o_weight)

    def _attend_one_each(self, q_BHD: Tensor, batch: Batch) -> Tensor:
        kv = batch.kv
        table, lengths = kv.page_table_BM, kv.lengths_B
        return kernels.decode_attention(q_BHD, *kv.pages(self.layer), table, lengths, self._scale, self.window)

    def _attend(self, q_THD: Tensor, batch: Batch) -> Tensor:
        contexts = [batch.kv.context(self.layer, sequence) for sequence in range(len(batch.spans))]
        attended = [
            kernels.attention(q_THD[start:stop], *context, self._scale, self.window)
            for context, (start, stop) in zip(contexts, batch.spans, strict=True)
        ]
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    @property
    def _scale(self) -> float:
        return float(self.head_dim**-0.5)
