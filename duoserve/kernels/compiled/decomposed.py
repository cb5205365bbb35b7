"""Replaces ops that a compiler would call as they are with ops that it makes loops of.

T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from duoserve.kernels.compiled.attention_loops import QUERIES, streamed_attention
from duoserve.kernels.compiled.traced import DECODE_ATTENTION

# The most scores that are sorted by comparing all with all.
COUNTED = 128


def _decode_attention(
    q_BHD: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Any:
    """Attention of one sequence as loops: for a short context a call of the op takes longer than these."""
    num_queries = q_BHD.shape[1] // k_pages_PSGD.shape[2]
    if len(q_BHD) > 1 or num_queries > QUERIES or window is not None or sinks_H is not None:
        return NotImplemented
    return streamed_attention(q_BHD, k_pages_PSGD, v_pages_PSGD, page_table_BM, lengths_B, scale)


def _sort(scores_TE: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """A router's sort of few scores: each score's place is the number of scores before it. NaN is highest."""
    if scores_TE.dim() != 2 or dim not in {-1, 1} or not (stable and descending) or scores_TE.shape[1] > COUNTED:
        return NotImplemented
    ids_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
    these_TE1, those_T1E = scores_TE[:, :, None], scores_TE[:, None, :]
    those_reach_TEE = (those_T1E >= these_TE1) | those_T1E.isnan()
    these_reach_TEE = (these_TE1 >= those_T1E) | these_TE1.isnan()
    places_TE1 = (those_reach_TEE & (~these_reach_TEE | (ids_E < ids_E[:, None]))).sum(-1, keepdim=True)
    ids_TE = ((places_TE1 == ids_E) * ids_E[:, None]).sum(1)
    return scores_TE.gather(1, ids_TE), ids_TE


# NotImplemented leaves an op as it is.
DECOMPOSED: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {DECODE_ATTENTION: _decode_attention, torch.ops.aten.sort.stable: _sort}
)
