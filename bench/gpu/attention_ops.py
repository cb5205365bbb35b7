"""Decode attention over the paged cache, as the kernel bench times it.

B sequences, H query heads, G KV heads, D head dimension, C context tokens, P pages, S tokens a page, M pages a
sequence has; in latent attention L latent and R rotary dimensions, W = L + R.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.attention_gqa import decode_attention
from duoserve.kernels.attention_mla import mla_decode_attention
from duoserve.kv_cache import PAGE_TOKENS
from gpu.moe_paths import Check
from gpu.op_cases import OpCase, Source, close
from gpu.timing import Work

QWEN3_HEADS = (32, 4, 128)  # query heads, KV heads, head dimension
DEEPSEEK_HEADS = (16, 512, 64)  # query heads, latent and rotary dimensions
CONTEXTS = ((1, 4096), (1, 32768), (16, 4096))  # sequences, tokens of each


def grouped_case(source: Source, batch: int, context: int, heads: tuple[int, int, int] = QWEN3_HEADS) -> OpCase:
    """Grouped-query attention of one new token a sequence; beside it torch's on a cache without pages."""
    num_heads, num_kv_heads, dim = heads
    step_bytes = 2 * 2 * batch * context * num_kv_heads * dim
    tables = _tables(source, step_bytes, batch, context)
    k_PSGD, v_PSGD = (source.random(tables.numel(), PAGE_TOKENS, num_kv_heads, dim) for _ in range(2))
    q_BHD, lengths_B = source.random(batch, num_heads, dim), _lengths(source, batch, context)

    def ours(table_BM: Tensor) -> Tensor:
        return decode_attention(q_BHD, k_PSGD, v_PSGD, table_BM, lengths_B, dim**-0.5)

    def check() -> Check:
        k, v = (_contiguous(pages, tables[0]).double() for pages in (k_PSGD, v_PSGD))
        q = q_BHD.double().view(batch, num_kv_heads, -1, dim)
        true = (q @ k.transpose(2, 3) * dim**-0.5).softmax(-1) @ v
        return close("decode_attention", ours(tables[0]).view_as(true), true, roundings=2)

    caches = [(_contiguous(k_PSGD, table), _contiguous(v_PSGD, table)) for table in tables]
    torchs: list[Work] = [
        lambda k=k, v=v: F.scaled_dot_product_attention(q_BHD[:, :, None], k, v, enable_gqa=True) for k, v in caches
    ]
    name = f"decode_attention, {batch} x {context} tokens, {num_heads} heads on {num_kv_heads}"
    steps: list[Work] = [partial(ours, table) for table in tables]
    return OpCase(name, steps, step_bytes, check, peers={"F.scaled_dot_product_attention, no pages": torchs})


def latent_case(source: Source, batch: int, context: int, heads: tuple[int, int, int] = DEEPSEEK_HEADS) -> OpCase:
    """Multi-head latent attention of one new token a sequence."""
    num_heads, latent, rope = heads
    step_bytes = 2 * batch * context * (latent + rope)
    tables = _tables(source, step_bytes, batch, context)
    pages_PSW = source.random(tables.numel(), PAGE_TOKENS, latent + rope)
    q_BHL, q_BHR = source.random(batch, num_heads, latent), source.random(batch, num_heads, rope)
    lengths_B, scale = _lengths(source, batch, context), (latent + rope) ** -0.5

    def ours(table_BM: Tensor) -> Tensor:
        return mla_decode_attention(q_BHL, q_BHR, pages_PSW, table_BM, lengths_B, scale)

    def check() -> Check:
        rows_BCW = pages_PSW[tables[0].long()].flatten(1, 2).double()
        scores = torch.cat((q_BHL, q_BHR), dim=-1).double() @ rows_BCW.transpose(1, 2) * scale
        return close("mla_decode_attention", ours(tables[0]), scores.softmax(-1) @ rows_BCW[..., :latent], roundings=2)

    name = f"mla_decode_attention, {batch} x {context} tokens, {num_heads} heads"
    return OpCase(name, [partial(ours, table) for table in tables], step_bytes, check)


def attention_builders(source: Source, longest: int) -> list[Callable[[], OpCase]]:
    """Both kinds, with contexts up to ``longest`` tokens; each case is built when its turn comes, caches are large."""
    contexts = [pair for pair in CONTEXTS if pair[1] <= longest]
    return [partial(build, source, *pair) for pair in contexts for build in (grouped_case, latent_case)]


def _tables(source: Source, step_bytes: int, batch: int, context: int) -> Tensor:
    """Page tables [sets, B, M] that share no page, the pages in no order."""
    count, pages = source.rotation(step_bytes), context // PAGE_TOKENS
    order = torch.randperm(count * batch * pages, device=source.device)
    return order.int().view(count, batch, pages)


def _lengths(source: Source, batch: int, context: int) -> Tensor:
    return torch.full((batch,), context, dtype=torch.int32, device=source.device)


def _contiguous(pages_PSGD: Tensor, table_BM: Tensor) -> Tensor:
    """[B, G, C, D] without pages."""
    return pages_PSGD[table_BM.long()].flatten(1, 2).transpose(1, 2).contiguous()
