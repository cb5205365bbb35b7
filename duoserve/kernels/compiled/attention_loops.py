"""Attention of one new token, written so that a compiler makes loops of it that serve every length of context.

H query heads, G KV heads, J = H / G queries of one, D head dimension, P pages, S tokens a page, M pages of the context
with C = M * S places, the last of which may hold no tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duoserve.kernels.compiled.streamed import laid_down

# The most queries of one KV head: their sums are made side by side, and a core has registers for no more.
QUERIES = 8


def streamed_attention(
    q_1HD: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    page_table_1M: Tensor,
    lengths_1: Tensor,
    scale: float,
) -> Tensor:
    """As ``decode_attention`` of one sequence without window and sinks, in float32 until the end -> [1, H, D].

    M may be one of the tracer's symbols. Places behind the context's end may hold NaN, so its first token is read in
    their place.
    """
    page_tokens, num_kv_heads = k_pages_PSGD.shape[1:3]
    rows_C, seen_C1 = _rows(page_table_1M[0], lengths_1, page_tokens)
    k_CGD, v_CGD = (pages_PSGD.flatten(0, 1)[rows_C].float() for pages_PSGD in (k_pages_PSGD, v_pages_PSGD))
    queries_J = laid_down(q_1HD[0].float() * scale).unflatten(0, (num_kv_heads, -1)).unbind(1)
    scores_JCG = laid_down(torch.stack([(q_GD * k_CGD).sum(-1) for q_GD in queries_J]))
    scores_JCG = torch.where(seen_C1, scores_JCG, float("-inf"))
    shares_JCG = laid_down((scores_JCG - scores_JCG.amax(1, keepdim=True)).exp())
    sums_J = [(shares_CG[..., None] * v_CGD).sum(0) for shares_CG in shares_JCG.unbind()]
    attended_JGD = torch.stack(sums_J) / shares_JCG.sum(1)[..., None]
    return attended_JGD.transpose(0, 1).flatten(0, 1)[None].to(q_1HD.dtype)


def _rows(pages_M: Tensor, lengths_1: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """The cache row to read at each place [C], and which places hold tokens [C, 1]."""
    places_C = torch.arange(pages_M.shape[0] * page_tokens, device=pages_M.device)
    rows_C = laid_down(pages_M[places_C // page_tokens].long() * page_tokens + places_C % page_tokens)
    seen_C = places_C < lengths_1
    return laid_down(torch.where(seen_C, rows_C, rows_C[0])), seen_C[:, None]
