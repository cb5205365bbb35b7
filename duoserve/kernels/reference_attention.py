"""The PyTorch spec of attention, which is also what runs on a CPU. Imports without triton.

T new tokens, C context tokens, B sequences, H query heads, G KV heads, D head dimension, P pages, S tokens a page, M
pages a sequence may have; in multi-head latent attention L latent and R rotated dimensions.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from duoserve.kernels.matmul import has_native_matmul
from duoserve.kernels.paging import context_rows

# Queries that are computed at a time where scores may be written out, so that these are never T x C.
QUERY_ROWS = 256
# What a GPU attends with: all that PyTorch has but cuDNN, which it prefers on Hopper from 2.11 on. That is faster once
# it runs, but takes 20 to 400 ms for a plan of each new length, and keeps all plans for as long as the thread lives.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# PyTorch's choice is the process's, so of two threads each would put back what the other has set.
_CHOICE = Lock()


def attention(
    q_THD: Tensor, k_CGD: Tensor, v_CGD: Tensor, scale: float, window: int | None, sinks_H: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention of the last T of C positions -> [T, H, D].

    Each position sees itself and what lies before it, at most ``window`` positions in all. A sink is one more logit of
    its head (not scaled) that takes its share of the softmax and adds nothing. Values may be narrower than keys: the
    output has their width. Source: Vaswani et al. (2017), Ainslie et al. (2023), Beltagy et al. (2020); sinks: Xiao et
    al. (2024) as in gpt-oss.
    """
    num_new, num_context = q_THD.shape[0], k_CGD.shape[0]
    if num_new == 1:
        first = 0 if window is None else max(0, num_context - window)
        return _of_one_query(q_THD, k_CGD[first:], v_CGD[first:], scale, sinks_H)
    windowed = window is not None and num_context > window
    plain_causal = num_new == num_context and not windowed and sinks_H is None
    if num_new > QUERY_ROWS and not (plain_causal and _streams_scores(q_THD, v_CGD)):
        return _in_blocks(q_THD, k_CGD, v_CGD, scale, window, sinks_H)
    mask = None if plain_causal else _visible(num_new, num_context, window, q_THD.device)
    if sinks_H is not None:
        k_CGD, v_CGD = _with_empty_row(k_CGD), _with_empty_row(v_CGD)
        mask = _with_sinks(mask, sinks_H, num_new, num_context, q_THD.dtype)[None]  # with 3 axes scores are written out
    out_HTD = _fused(
        q_THD.transpose(0, 1)[None],
        k_CGD.transpose(0, 1)[None],
        v_CGD.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=plain_causal,
        scale=scale,
        enable_gqa=q_THD.shape[1] != k_CGD.shape[1],
    )[0]
    return out_HTD.transpose(0, 1)


def _of_one_query(q_1HD: Tensor, k_CGD: Tensor, v_CGD: Tensor, scale: float, sinks_H: Tensor | None) -> Tensor:
    """``attention`` of one query that sees all. The heads of a KV head become its queries, so that it is read once."""
    dtype, (num_context, num_kv_heads, _) = q_1HD.dtype, k_CGD.shape
    if q_1HD.is_cpu and not has_native_matmul(dtype):  # takes a third of the time of half precision
        q_1HD, k_CGD, v_CGD = q_1HD.float(), k_CGD.float(), v_CGD.float()
    mask = None
    if sinks_H is not None:
        k_CGD, v_CGD = _with_empty_row(k_CGD), _with_empty_row(v_CGD)
        mask = _with_sinks(None, sinks_H, 1, num_context, q_1HD.dtype).view(1, num_kv_heads, -1, num_context + 1)
    out_1GJD = _fused(
        q_1HD.reshape(1, num_kv_heads, -1, q_1HD.shape[-1]),
        k_CGD.transpose(0, 1)[None],
        v_CGD.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
    )
    return out_1GJD.flatten(1, 2).to(dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention, [1, heads, tokens, D] each; on a GPU by one of WITHOUT_PLANS.

    In float32 that is MATH: EFFICIENT_ATTENTION would make each product of three in TF32, which are less exact.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with _CHOICE, sdpa_kernel(SDPBackend.MATH if q.dtype is torch.float32 else WITHOUT_PLANS):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _with_empty_row(x_CGD: Tensor) -> Tensor:
    """The rows, and a row of zeros behind the context, for sinks."""
    return F.pad(x_CGD, (0, 0, 0, 0, 0, 1))


def _streams_scores(q_THD: Tensor, v_CGD: Tensor) -> bool:
    """Whether PyTorch's causal attention with shared KV heads avoids writing scores out.

    It does, except on a GPU in float32, and on a CPU if values are narrower than keys.
    """
    return q_THD.shape[-1] == v_CGD.shape[-1] if q_THD.is_cpu else q_THD.dtype is not torch.float32


def _in_blocks(
    q_THD: Tensor, k_CGD: Tensor, v_CGD: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    """``attention`` by blocks of QUERY_ROWS queries, each over the part of the context that they see.

    The largest block comes first, as a GPU's allocator then reuses the memory of its scores for all others.
    """
    num_new, before = q_THD.shape[0], k_CGD.shape[0] - q_THD.shape[0]
    blocks = []
    for start in range(0, num_new, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, num_new)
        first = 0 if window is None else max(0, before + start + 1 - window)
        blocks.append((slice(start, stop), slice(first, before + stop)))
    blocks.sort(key=lambda block: _length(block[0]) * _length(block[1]), reverse=True)
    attended_THD = q_THD.new_empty((num_new, q_THD.shape[1], v_CGD.shape[-1]))
    for new, seen in blocks:
        attended_THD[new] = attention(q_THD[new], k_CGD[seen], v_CGD[seen], scale, window, sinks_H)
    return attended_THD


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _visible(num_new: int, num_context: int, window: int | None, device: torch.device) -> Tensor:
    """True where query row t may see context column c, [T, C]."""
    age_TC = torch.arange(num_context - num_new, num_context, device=device)[:, None] - torch.arange(
        num_context, device=device
    )
    return (age_TC >= 0) & (age_TC < (window or num_context))


def _with_sinks(
    visible_TC: Tensor | None, sinks_H: Tensor, num_new: int, num_context: int, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores, [H, T, C + 1], with the sinks in the last column, whose key and value are zero."""
    added_HTC = torch.zeros((len(sinks_H), num_new, num_context + 1), dtype=dtype, device=sinks_H.device)
    added_HTC[..., -1] = sinks_H[:, None]
    if visible_TC is not None:
        added_HTC[..., :-1].masked_fill_(~visible_TC, float("-inf"))
    return added_HTC


def decode_attention(
    q_BHD: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One new token of each sequence over the paged KV cache, its own keys and values included -> [B, H, D].

    Token c of sequence b is row ``c % S`` of page ``page_table_BM[b, c // S]``; ``lengths_B`` counts the tokens (int32
    or int64, like the table). A length of 0, which marks padding of a batch, gives zeros. ``attention`` has the
    formula.
    """
    attended = []
    for sequence, length in enumerate(lengths_B.tolist()):
        q_1HD = q_BHD[sequence : sequence + 1]
        if length:
            rows_C = context_rows(page_table_BM[sequence].tolist(), length, k_pages_PSGD.shape[1])
            k_CGD, v_CGD = k_pages_PSGD.flatten(0, 1)[rows_C], v_pages_PSGD.flatten(0, 1)[rows_C]
            attended.append(attention(q_1HD, k_CGD, v_CGD, scale, window, sinks_H))
        else:
            attended.append(q_1HD.new_zeros((1, q_1HD.shape[1], v_pages_PSGD.shape[-1])))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def mla_decode_attention(
    q_latent_BHL: Tensor,
    q_rope_BHR: Tensor,
    latent_pages_PSW: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
) -> Tensor:
    """Multi-head latent attention of one new token of each sequence, in absorbed form -> [B, H, L].

    A row of the cache is ``[latent L | rotated key R]``, W = L + R wide, and serves all heads: ``score = (q_latent .
    latent + q_rope . key) * scale``, ``out = softmax(score) latent``. The caller has multiplied the queries by the key
    half of ``kv_b_proj`` and multiplies the output by its value half. Table and lengths as in ``decode_attention``.
    Source: DeepSeek-AI (2024a).
    """
    num_latent = q_latent_BHL.shape[-1]
    q_BHW = torch.cat((q_latent_BHL, q_rope_BHR), dim=-1).float()
    out_BHL = torch.zeros_like(q_latent_BHL)
    for sequence, length in enumerate(lengths_B.tolist()):
        if length:
            rows_C = context_rows(page_table_BM[sequence].tolist(), length, latent_pages_PSW.shape[1])
            keys_C1W = latent_pages_PSW.flatten(0, 1)[rows_C][:, None].float()
            out_BHL[sequence] = attention(q_BHW[sequence][None], keys_C1W, keys_C1W[..., :num_latent], scale, None)[0]
    return out_BHL
