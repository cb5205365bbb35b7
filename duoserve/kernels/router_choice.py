"""The router's softmax or sigmoid and its top-k with group limits, in Triton: one program a token.

T tokens, K top-k, E experts, N expert groups, S experts a group (E = N * S; N = 1 without groups).
"""

from __future__ import annotations

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from duoserve.kernels.checks import check_one_device, check_tensor, require
from duoserve.kernels.numerics import TRITON_DTYPES, interpreting, to_dtype
from duoserve.kernels.reference_small import Scoring

FLOATS = tuple(TRITON_DTYPES)
MAX_EXPERTS = 4096
# Below every rank: stands for padding, and for what has been chosen already.
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _rank(score, ids):
    """Unique int64 ranks that order by score, then lowest id first; NaN ranks above every number."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, ordered)  # NaN
    return (ordered.to(tl.int64) << 32) - ids


@triton.jit
def _id_of(rank):
    return (-rank) & 0x7FFFFFFF


@triton.jit
def _only_best_groups(
    choice_NS, rank_NS, N: tl.constexpr, TOPK_GROUP: tl.constexpr, BEST: tl.constexpr, N_PAD: tl.constexpr
):
    """-inf for every expert outside the TOPK_GROUP groups whose BEST highest scores have the largest sum."""
    score_N = tl.zeros((N_PAD,), tl.float32)
    for _ in tl.static_range(BEST):
        best_N = tl.max(rank_NS, axis=1)
        is_best_NS = rank_NS == best_N[:, None]
        score_N += tl.sum(tl.where(is_best_NS, choice_NS, 0.0), axis=1)
        rank_NS = tl.where(is_best_NS, LOWEST, rank_NS)
    groups = tl.arange(0, N_PAD)
    rank_N = tl.where(groups < N, _rank(score_N, groups), LOWEST)
    chosen_N = groups < 0
    for _ in tl.static_range(TOPK_GROUP):
        is_best_N = rank_N == tl.max(rank_N, axis=0)
        chosen_N = chosen_N | is_best_N
        rank_N = tl.where(is_best_N, LOWEST, rank_N)
    return tl.where(chosen_N[:, None], choice_NS, float("-inf"))


@triton.jit
def _router_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    logits_stride,
    scale,
    K: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIGMOID: tl.constexpr,
    OF_TOPK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    N_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, N_PAD)[:, None]
    members = tl.arange(0, S_PAD)[None, :]
    ids_NS = groups * S + members
    inside = (groups < N) & (members < S)
    # Padding is -inf, which adds nothing to a softmax.
    logits_NS = tl.load(logits_ptr + token * logits_stride + ids_NS, mask=inside, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score_NS = 1.0 / (1.0 + tl.exp(-logits_NS))
    elif OF_TOPK:
        score_NS = logits_NS
    else:
        exp_NS = tl.exp(logits_NS - tl.max(logits_NS))
        score_NS = exp_NS / tl.sum(exp_NS)

    choice_NS = score_NS if SIGMOID else logits_NS
    if HAS_BIAS:
        choice_NS += tl.load(bias_ptr + ids_NS, mask=inside, other=0.0).to(tl.float32)
    if N > 1:
        rank_NS = tl.where(inside, _rank(choice_NS, ids_NS), LOWEST)
        choice_NS = _only_best_groups(choice_NS, rank_NS, N, TOPK_GROUP, 2 if SIGMOID else 1, N_PAD)
    rank_NS = tl.where(inside, _rank(choice_NS, ids_NS), LOWEST)

    places = tl.arange(0, K_PAD)
    ids_K = tl.zeros((K_PAD,), tl.int64)
    weights_K = tl.zeros((K_PAD,), tl.float32)
    for j in range(K):
        best = tl.max(rank_NS)
        is_best_NS = rank_NS == best
        ids_K = tl.where(places == j, _id_of(best), ids_K)
        weights_K = tl.where(places == j, tl.sum(tl.where(is_best_NS, score_NS, 0.0)), weights_K)
        rank_NS = tl.where(is_best_NS, LOWEST, rank_NS)

    if OF_TOPK:
        exp_K = tl.where(places < K, tl.exp(weights_K - tl.max(tl.where(places < K, weights_K, float("-inf")))), 0.0)
        weights_K = exp_K / tl.sum(exp_K)
    elif RENORMALIZE:
        weights_K = weights_K / (tl.sum(weights_K) + (1e-20 if SIGMOID else 0.0))
    weights_K = to_dtype(weights_K * scale, ROUND_TO, INTERPRET).to(tl.float32)
    tl.store(weights_ptr + token * K + places, weights_K, mask=places < K)
    tl.store(ids_ptr + token * K + places, ids_K, mask=places < K)


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
    """As the twin in reference_small.py. The choice is the same, ties included, wherever both have the same scores.

    (The sigmoid of a logit may differ in its last bit between the two.) Logits and bias are float32, float16 or
    bfloat16; there are at most 4096 experts. Raises KernelError otherwise, and if the groups allow fewer than K
    experts. Whatever the logits, NaN included, ids are in range, and no token has one twice.
    """
    check_router(logits_TE, top_k, scoring, bias_E, n_group, topk_group)
    require(round_to in FLOATS, f"round_to is {round_to}; it must be one of {FLOATS}")
    num_tokens, num_experts = logits_TE.shape
    weights_TK = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits_TE.device)
    group_size = num_experts // n_group
    padded_groups, padded_size = triton.next_power_of_2(n_group), triton.next_power_of_2(group_size)
    if num_tokens:
        _router_kernel[(num_tokens,)](
            logits_TE,
            logits_TE if bias_E is None else bias_E,
            weights_TK,
            ids_TK,
            logits_TE.stride(0),
            scale,
            K=top_k,
            N=n_group,
            S=group_size,
            TOPK_GROUP=topk_group,
            SIGMOID=scoring == "sigmoid",
            OF_TOPK=scoring == "softmax_of_topk",
            HAS_BIAS=bias_E is not None,
            RENORMALIZE=renormalize,
            ROUND_TO=TRITON_DTYPES[round_to],
            N_PAD=padded_groups,
            S_PAD=padded_size,
            K_PAD=triton.next_power_of_2(top_k),
            INTERPRET=interpreting(),
            # The K rounds of a maximum stay within one warp as long as its lanes hold 16 experts at most.
            num_warps=max(1, padded_groups * padded_size // 512),
        )
    return weights_TK, ids_TK


def check_router(
    logits_TE: Tensor, top_k: int, scoring: Scoring, bias_E: Tensor | None, n_group: int, topk_group: int
) -> None:
    """Raises KernelError unless the operands define a choice."""
    check_tensor("logits", logits_TE, (None, None), FLOATS)
    num_experts = logits_TE.shape[1]
    require(logits_TE.stride(1) == 1, f"logits[t] must be contiguous; its strides are {logits_TE.stride()}")
    require(1 <= num_experts <= MAX_EXPERTS, f"{num_experts} experts; there must be 1 to {MAX_EXPERTS}")
    require(scoring in get_args(Scoring), f"scoring is {scoring!r}; it must be one of {get_args(Scoring)}")
    if bias_E is not None:
        check_tensor("bias", bias_E, (num_experts,), FLOATS)
        require(bias_E.is_contiguous(), f"bias must be contiguous; its strides are {bias_E.stride()}")
        check_one_device(logits=logits_TE, bias=bias_E)
    require(n_group >= 1 and num_experts % n_group == 0, f"{num_experts} experts do not form {n_group} equal groups")
    require(1 <= topk_group <= n_group, f"topk_group is {topk_group} of {n_group} groups")
    group_size = num_experts // n_group
    least = 2 if scoring == "sigmoid" and n_group > 1 else 1
    require(group_size >= least, f"a group has {group_size} experts; its score is the sum of its {least} best")
    allowed = topk_group * group_size
    require(1 <= top_k <= allowed, f"top_k is {top_k}, but {allowed} experts can be chosen")
