"""Decode attention of a few short sequences in one call on a CPU, where a call costs as much as a sequence's work.

B sequences, H query heads, G KV heads, J = H / G queries of one, D head dimension, P pages, S tokens a page, M pages a
sequence may have, C tokens of the longest context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.matmul import has_native_matmul
from duoserve.kernels.reference_attention import decode_attention

# Contexts are copied side by side, as long as the longest: up to so many tokens, if at most half of them is padding.
TOGETHER_TOKENS = 4096


def decode_attention_together(
    q_BHD: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """As ``decode_attention``, whose padding must come last. How it is computed depends on ``lengths_B`` only."""
    lengths = [length for length in lengths_B.tolist() if length]
    longest = max(lengths, default=0)
    alike = len(lengths) > 1 and len(lengths) * longest <= min(TOGETHER_TOKENS, 2 * sum(lengths))
    if sinks_H is not None or (window is not None and window < longest) or not alike:
        return decode_attention(
            q_BHD, k_pages_PSGD, v_pages_PSGD, page_table_BM, lengths_B, scale, window, sinks_H
        ).contiguous()
    seen = slice(len(lengths))
    rows_BC, seen_BC = _rows(page_table_BM[seen], lengths_B[seen], longest, k_pages_PSGD.shape[1])
    dtype = q_BHD.dtype if has_native_matmul(q_BHD.dtype) else torch.float32
    attended_BGJD = F.scaled_dot_product_attention(
        q_BHD[seen].to(dtype).unflatten(1, (k_pages_PSGD.shape[2], -1)),
        _heads(k_pages_PSGD, rows_BC).to(dtype),
        _heads(v_pages_PSGD, rows_BC).to(dtype),
        attn_mask=seen_BC[:, None, None],
        scale=scale,
    )
    out_BHD = q_BHD.new_zeros(*q_BHD.shape[:2], v_pages_PSGD.shape[-1])
    out_BHD[seen] = attended_BGJD.flatten(1, 2)
    return out_BHD


def _rows(page_table_BM: Tensor, lengths_B: Tensor, longest: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """The cache rows of each sequence's tokens, and which places have one; others repeat a sequence's first row."""
    starts_BM1 = (page_table_BM[:, : -(-longest // page_tokens)].long() * page_tokens)[:, :, None]
    rows_BC = (starts_BM1 + torch.arange(page_tokens, device=starts_BM1.device)).flatten(1)[:, :longest]
    seen_BC = torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]
    return torch.where(seen_BC, rows_BC, rows_BC[:, :1]), seen_BC


def _heads(pages_PSGD: Tensor, rows_BC: Tensor) -> Tensor:
    """Keys or values as attention takes them: [B, G, C, D]. Indexing would take three times as long."""
    heads_BCGD: Tensor = pages_PSGD.flatten(0, 1).index_select(0, rows_BC.flatten()).unflatten(0, rows_BC.shape)
    return heads_BCGD.transpose(1, 2)
