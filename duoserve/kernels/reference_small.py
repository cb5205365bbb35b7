"""The PyTorch spec of the small ops between the matrix products, which also runs on a CPU. Imports without triton.

T tokens, K top-k, E experts, H hidden (in RoPE: query heads), G KV heads, D head dimension, R rotated dimensions, P
pages, S tokens a page, W elements of a row of them, F = R/2 frequencies, N expert groups. Sums are made in at least
float32; results have the input's dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scoring = Literal["softmax", "sigmoid", "softmax_of_topk"]
# Sorting up to this many scores (those of a decode step) costs less than finding out which rows have ties.
SORT_ELEMENTS = 4096


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, of any shape [..., H].

    ``x / sqrt(...)`` is rounded to the input's dtype before the weight is applied, as in transformers' models, except
    its gpt-oss, which rounds only once, after that. Source: Zhang and Sennrich (2019).
    """
    wide_TH = x_TH.float()
    mean_T1 = (wide_TH * wide_TH).sum(-1, keepdim=True) / x_TH.shape[-1]
    return weight_H * (wide_TH * (mean_T1 + eps).rsqrt()).to(x_TH.dtype)


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``sum = x + residual`` in the inputs' dtype -> (``rms_norm(sum)``, ``sum``), both [T, H]."""
    sum_TH = x_TH + residual_TH
    return rms_norm(sum_TH, weight_H, eps), sum_TH


def rope_frequencies(dim: int, theta: float) -> Tensor:
    """``1 / theta^(2i/R)``, float32 [R/2] on the CPU, for R = ``dim`` rotated dimensions. Source: Su et al. (2021)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def rope_table(
    positions_T: Tensor, frequencies_F: Tensor, dtype: torch.dtype, magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, F] of ``position * frequency``, times ``magnitude``: float32, rounded to ``dtype``.

    Transformers rounds them too, except those of DeepSeek-V2.
    """
    angles_T1F = positions_T.float()[:, None, None] * frequencies_F.to(positions_T.device)
    cos_T1F, sin_T1F = angles_T1F.cos() * magnitude, angles_T1F.sin() * magnitude
    return cos_T1F.to(dtype).float(), sin_T1F.to(dtype).float()


def apply_rope(x_THD: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, interleaved: bool = False) -> Tensor:
    """Turns the first R dimensions of every head, in pairs, by its position's angles -> [T, H, D].

    With tables of width R/2 a pair is (x_i, x_{i + R/2}), or (x_{2i}, x_{2i + 1}) if ``interleaved``; dimensions from R
    on stay as they are. Computed in float32 and rounded once. Source: Su et al. (2021).
    """
    half = cos_T1R.shape[-1]
    turned_THR, rest = x_THD[..., : 2 * half].float(), x_THD[..., 2 * half :]
    cos, sin = cos_T1R.float(), sin_T1R.float()
    low, high = (turned_THR[..., 0::2], turned_THR[..., 1::2]) if interleaved else turned_THR.chunk(2, dim=-1)
    pair = (low * cos - high * sin, high * cos + low * sin)
    out_THR = (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(x_THD.dtype)
    return torch.cat((out_THR, rest), dim=-1) if rest.shape[-1] else out_THR


def rope_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    k_pages_PSGD: Tensor,
    v_pages_PSGD: Tensor,
    rows_T: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Rotates queries and keys and stores keys and values in the paged cache -> rotated queries [T, H, D].

    Token t goes to row ``rows_T[t]`` = page * S + place (int64). A negative row, which marks padding of a batch, stores
    nothing. No two tokens may have the same row. ``apply_rope`` has the formula.
    """
    turned_TND = apply_rope(torch.cat((q_THD, k_TGD), dim=1), cos_T1R, sin_T1R, interleaved)
    q_THD, k_TGD = turned_TND[:, : q_THD.shape[1]], turned_TND[:, q_THD.shape[1] :]
    write_rows(k_TGD, k_pages_PSGD, rows_T)
    write_rows(v_TGD, v_pages_PSGD, rows_T)
    return q_THD


def write_rows(values_TW: Tensor, pages_PSW: Tensor, rows_T: Tensor) -> None:
    """Stores the row of token t in row ``rows_T[t]`` = page * S + place (int64) of the paged cache.

    No two tokens may have the same row. A negative row stores nothing, as in ``rope_write_kv``.
    """
    if rows_T.shape[0] and int(rows_T.min()) < 0:
        kept_T = rows_T >= 0
        values_TW, rows_T = values_TW[kept_T], rows_T[kept_T]
    pages_PSW.flatten(0, 1).index_copy_(0, rows_T, values_TW)


def router_topk(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    bias_E: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    round_to: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The router's choice -> float32 weights [T, K] and int64 ids [T, K], in descending order of their scores.

    ``scoring`` says what an expert's weight is, in float32 whatever the dtype of the logits:

    - "softmax": over all E. Mixtral, granite and gpt-oss with ``renormalize`` (a softmax over the chosen alone is the
      same number); Qwen and OLMoE by their ``norm_topk_prob``; DeepSeek-V2 without.
    - "sigmoid": of each logit; chosen by ``sigmoid + bias_E``, weighted by the sigmoid alone (DeepSeek-V3, GLM-4).
      ``renormalize`` divides by (sum + 1e-20).
    - "softmax_of_topk": over the K chosen logits, as granite and gpt-oss write it; ``renormalize`` changes nothing.

    With ``n_group`` > 1 the experts form equal groups in order of their ids, and only those of the best ``topk_group``
    groups can be chosen; a group's score is its best expert's (softmax) or the sum of its two best (sigmoid). Weights
    are multiplied by ``scale`` and then rounded to ``round_to``. Of equal scores the lowest id wins, of experts and of
    groups; NaN ranks above every number. Softmax keeps the order of the logits, so logits are compared. Sources: Jiang
    et al. (2024), DeepSeek-AI (2024a, 2024b).
    """
    logits = logits_TE.float()
    scores_TE = logits.sigmoid() if scoring == "sigmoid" else logits
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if n_group > 1:
        choice_TE = _only_best_groups(choice_TE, n_group, topk_group, best=2 if scoring == "sigmoid" else 1)
    ids_TK = _best(choice_TE, top_k)
    if scoring == "softmax_of_topk" or (scoring == "softmax" and renormalize):  # both give the same numbers
        weights_TK = logits.gather(1, ids_TK).softmax(-1)
    else:
        weights_TK = (logits.softmax(-1) if scoring == "softmax" else scores_TE).gather(1, ids_TK)
        if renormalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return (weights_TK if scale == 1.0 else weights_TK * scale).to(round_to).float(), ids_TK


def _best(scores_TE: Tensor, count: int) -> Tensor:
    """The ids [T, count] of the highest scores in descending order; of equal scores the lowest id comes first.

    ``topk`` is faster than a stable sort but leaves the order of ties open, so rows with ties (or NaN) are sorted.
    """
    if scores_TE.numel() <= SORT_ELEMENTS:
        return _sorted(scores_TE)[:, :count]
    values, ids = scores_TE.topk(min(count + 1, scores_TE.shape[1]), dim=-1)
    tied_T = ~(values[:, :-1] > values[:, 1:]).all(-1)
    ids[tied_T] = _sorted(scores_TE[tied_T])[:, : ids.shape[1]]
    return ids[:, :count]


def _sorted(scores_TE: Tensor) -> Tensor:
    """All ids from the highest score to the lowest; of equal scores the lowest id comes first."""
    ids_TE: Tensor = scores_TE.sort(dim=-1, descending=True, stable=True).indices
    return ids_TE


def _only_best_groups(choice_TE: Tensor, n_group: int, topk_group: int, best: int) -> Tensor:
    """-inf for every expert outside the ``topk_group`` groups whose ``best`` highest scores have the largest sum."""
    grouped_TNE = choice_TE.view(len(choice_TE), n_group, choice_TE.shape[1] // n_group)
    group_scores_TN = grouped_TNE.topk(best, dim=-1).values.sum(-1)
    chosen_TN = torch.zeros_like(group_scores_TN, dtype=torch.bool)
    chosen_TN.scatter_(1, _best(group_scores_TN, topk_group), True)
    return grouped_TNE.masked_fill(~chosen_TN[..., None], float("-inf")).flatten(-2)


def moe_combine(y_TKH: Tensor, topk_weights_TK: Tensor, shared_TH: Tensor | None = None) -> Tensor:
    """``sum_j weight_j * y_j``, plus the shared expert's output last -> [T, H] in ``y``'s dtype.

    Sums are made in float32 in the order of j, so that the order in which experts arrive leaves no trace.
    """
    out_TH = y_TKH[:, 0] * topk_weights_TK[:, :1]  # float32, as the weights are
    for j in range(1, y_TKH.shape[1]):
        out_TH = out_TH + y_TKH[:, j] * topk_weights_TK[:, j : j + 1]
    return (out_TH if shared_TH is None else out_TH + shared_TH.float()).to(y_TKH.dtype)
