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
        qkv_THD = kernels.linear(x_TH, self.qkv_weight).view(len(x_TH), -1, self.head_dim)
        q_THD, k_TGD, v_TGD = torch.split(qkv_THD, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q_THD, k_TGD = kernels.apply_rope(q_THD, *rope), kernels.apply_rope(k_TGD, *rope)
        batch.kv.append(self.layer, k_TGD, v_TGD)
        attended = [self._attend(i, q_THD[start:stop], batch) for i, (start, stop) in enumerate(batch.spans)]
        return kernels.linear(torch.cat(attended) if len(attended) > 1 else attended[0], self.o_weight)

    def _attend(self, sequence: int, q_THD: Tensor, batch: Batch) -> Tensor:
        k_CGD, v_CGD = batch.kv.context(self.layer, sequence)
        out_THD = kernels.attention(q_THD, k_CGD, v_CGD, self.head_dim**-0.5, self.window)
        return out_THD.reshape(len(q_THD), -1)
