"""Multi-head latent attention: one latent and one rotated key of a token are cached for all heads.

T new tokens, B sequences with one new token each, C context tokens, H heads, N plain and R rotated dimensions of a
query or key, V dimensions of a value, L latent, W = L + R of a cache row, Z = N + V that a head reads from a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duoserve import kernels
from duoserve.architecture import LatentAttentionConfig
from duoserve.kernels import Products
from duoserve.models.batch import Batch
from duoserve.models.layers import Linear, RMSNorm
from duoserve.models.tensors import Tensors

# The norms within low-rank projections use this, whatever the model's other norms use.
RANK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class LowRank:
    """A projection in two steps with a norm between them."""

    down: Linear
    norm: RMSNorm
    up: Linear

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.up(self.norm(self.down(x_TH)))


@dataclass(frozen=True)
class LatentAttention:
    """A prompt expands latents to keys and values; a decode step works on the latents themselves (absorbed form).

    ``expand_HZL`` expands a latent: to the plain dimensions of the keys, then the values.
    """

    layer: int
    config: LatentAttentionConfig
    interleaved: bool
    query: Callable[[Tensor], Tensor]
    compress: Linear
    latent_norm: RMSNorm
    expand_HZL: Tensor
    out: Linear
    products: Products = Products.FASTEST

    @classmethod
    def load(
        cls, layer: int, config: LatentAttentionConfig, interleaved: bool, hidden: int, tensors: Tensors
    ) -> LatentAttention:
        """Loads it from the projections of queries, latents, keys and values, and the output."""
        latent, out_dim = config.latent_dim, config.nope_dim + config.value_dim
        expand = Linear.load(tensors.under("kv_b_proj"), config.num_heads * out_dim, latent)
        return cls(
            layer=layer,
            config=config,
            interleaved=interleaved,
            query=_load_query(config, hidden, tensors),
            compress=Linear.load(tensors.under("kv_a_proj_with_mqa"), latent + config.rope_dim, hidden, config.bias),
            latent_norm=RMSNorm.load(tensors.under("kv_a_layernorm"), latent, RANK_NORM_EPS),
            expand_HZL=expand.weight_NK.view(config.num_heads, out_dim, latent),
            out=Linear.load(tensors.under("o_proj"), hidden, config.num_heads * config.value_dim, config.bias),
        )

    def __call__(self, x_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        config = self.config
        q_THQ = self.query(x_TH).view(len(x_TH), config.num_heads, config.query_dim)
        q_nope_THN, q_rope_THR = torch.split(q_THQ, [config.nope_dim, config.rope_dim], dim=-1)
        q_rope_THR = kernels.apply_rope(q_rope_THR, *rope, self.interleaved)
        self._remember(x_TH, rope, batch)
        # Prompts of one token each look like a decode step. With BY_TILE their bits must be those that they have beside
        # longer prompts, so they take the prompts' way.
        one_each = batch.is_decode and self.products is not Products.BY_TILE
        attend = self._attend_one_each if one_each else self._attend
        return self.out(attend(q_nope_THN, q_rope_THR, batch).flatten(1))

    def _remember(self, x_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> None:
        """Puts the latent and the rotated key of every new token into the cache."""
        latent_TL, key_TR = torch.split(self.compress(x_TH), [self.config.latent_dim, self.config.rope_dim], dim=-1)
        key_T1R = kernels.apply_rope(key_TR[:, None], *rope, self.interleaved)
        row_TW = torch.cat((self.latent_norm(latent_TL), key_T1R[:, 0]), dim=-1)
        kernels.write_rows(row_TW, self._pages(batch), batch.kv.rows_T)

    def _attend_one_each(self, q_nope_BHN: Tensor, q_rope_BHR: Tensor, batch: Batch) -> Tensor:
        """Attended values [B, H, V]; queries are mapped to the space of latents instead of latents to keys."""
        kv, nope = batch.kv, self.config.nope_dim
        q_latent_HBL = kernels.batched_product(q_nope_BHN.transpose(0, 1), self.expand_HZL[:, :nope], self.products)
        out_BHL = kernels.mla_decode_attention(
            q_latent_HBL.transpose(0, 1),
            q_rope_BHR,
            self._pages(batch),
            kv.page_table_BM,
            kv.lengths_B,
            self.config.scale,
        )
        out_HBL, values_HLV = out_BHL.transpose(0, 1), self.expand_HZL[:, nope:].transpose(1, 2)
        return kernels.batched_product(out_HBL, values_HLV, self.products).transpose(0, 1)

    def _attend(self, q_nope_THN: Tensor, q_rope_THR: Tensor, batch: Batch) -> Tensor:
        """Attended values [T, H, V]."""
        q_THQ = torch.cat((q_nope_THN, q_rope_THR), dim=-1)
        attended = [
            kernels.attention(q_THQ[start:stop], *self._keys_values(batch, sequence), self.config.scale, None)
            for sequence, (start, stop) in enumerate(batch.spans)
        ]
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def _keys_values(self, batch: Batch, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys [C, H, N + R] and values [C, H, V] of one sequence."""
        config = self.config
        row_C1W, _ = batch.kv.context(self.layer, sequence)
        latent_CL, key_CR = torch.split(row_C1W[:, 0], [config.latent_dim, config.rope_dim], dim=-1)
        read_CHZ = kernels.linear(latent_CL, self.expand_HZL.flatten(0, 1)).view(len(latent_CL), config.num_heads, -1)
        k_nope_CHN, v_CHV = torch.split(read_CHZ, [config.nope_dim, config.value_dim], dim=-1)
        return torch.cat((k_nope_CHN, key_CR[:, None].expand(-1, config.num_heads, -1)), dim=-1), v_CHV

    def _pages(self, batch: Batch) -> Tensor:
        """The cache of this layer, [P, S, W]."""
        return batch.kv.pages(self.layer)[0].squeeze(2)


def _load_query(config: LatentAttentionConfig, hidden: int, tensors: Tensors) -> Callable[[Tensor], Tensor]:
    width, rank = config.num_heads * config.query_dim, config.query_rank
    if rank is None:
        return Linear.load(tensors.under("q_proj"), width, hidden)
    return LowRank(
        Linear.load(tensors.under("q_a_proj"), rank, hidden, config.bias),
        RMSNorm.load(tensors.under("q_a_layernorm"), rank, RANK_NORM_EPS),
        Linear.load(tensors.under("q_b_proj"), width, rank),
    )
