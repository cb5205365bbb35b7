"""The small fused ops of a decode step, as the kernel bench times them; what they read is in the L2 cache, where the op
before has left it.

T tokens, K top-k, E experts, H hidden, P pages, S tokens a page, G KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from duoserve.kernels import reference
from duoserve.kernels.combine import moe_combine
from duoserve.kernels.norm import add_rms_norm
from duoserve.kernels.rope import rope_write_kv
from duoserve.kernels.route_sort import route_plan
from duoserve.kernels.router_choice import router_topk
from duoserve.kv_cache import PAGE_TOKENS
from gpu.attention_ops import QWEN3_HEADS
from gpu.kernel_targets import PLAN_TOKENS, plan_name
from gpu.moe_operands import STEPS
from gpu.moe_paths import Check, relative_error, same_plan
from gpu.moe_shapes import DEEPSEEK, QWEN3, MoEShape
from gpu.op_cases import OpCase, Source, close
from gpu.timing import Work

PREFILL_TOKENS = 32768


def plan_case(source: Source, tokens: int, shape: MoEShape) -> OpCase:
    """The routing plan of one layer."""
    ids_TK = torch.rand((tokens, shape.experts), device=source.device).topk(shape.top_k, dim=1).indices.contiguous()
    slots_E = torch.randperm(shape.experts, device=source.device).int()

    def check() -> Check:
        same = same_plan(route_plan(ids_TK, slots_E), reference.route_plan(ids_TK, slots_E))
        return Check("route_plan", float(not same), 0.0)

    steps: list[Work] = [lambda: route_plan(ids_TK, slots_E)] * STEPS
    return OpCase(plan_name(tokens), steps, ids_TK.nbytes + 4 * ids_TK.numel(), check)


def router_case(source: Source, tokens: int, shape: MoEShape) -> OpCase:
    """Softmax and top-k of the router's logits."""
    logits_TE = torch.randn((tokens, shape.experts), device=source.device)

    def check() -> Check:
        (weights, ids), (true, true_ids) = (op(logits_TE, shape.top_k) for op in (router_topk, reference.router_topk))
        return Check("router_topk", relative_error(weights, true) + float(not torch.equal(ids, true_ids)), 1e-5)

    steps: list[Work] = [lambda: router_topk(logits_TE, shape.top_k)] * STEPS
    return OpCase(f"router_topk, {tokens} x {shape.experts}", steps, logits_TE.nbytes, check)


def norm_case(source: Source, tokens: int, hidden: int) -> OpCase:
    """The residual sum and its RMSNorm."""
    x_TH, residual_TH, weight_H = source.random(tokens, hidden), source.random(tokens, hidden), source.random(hidden)

    def check() -> Check:
        ours, true = (op(x_TH, residual_TH, weight_H, 1e-6) for op in (add_rms_norm, reference.add_rms_norm))
        return close("add_rms_norm", torch.cat(ours), torch.cat(true), roundings=2)

    steps: list[Work] = [lambda: add_rms_norm(x_TH, residual_TH, weight_H, 1e-6)] * STEPS
    return OpCase(f"add_rms_norm, {tokens} x {hidden}", steps, 4 * x_TH.nbytes, check)


def rope_case(source: Source, tokens: int, heads: tuple[int, int, int] = QWEN3_HEADS) -> OpCase:
    """Rotation of queries and keys, and the write of keys and values to the cache."""
    num_heads, num_kv_heads, dim = heads
    q, k, v = (source.random(tokens, count, dim) for count in (num_heads, num_kv_heads, num_kv_heads))
    positions_T = torch.arange(tokens, device=source.device) + 1000
    cos, sin = reference.rope_table(positions_T, reference.rope_frequencies(dim, 1e6), torch.bfloat16)
    pages = torch.zeros((4, tokens, PAGE_TOKENS, num_kv_heads, dim), dtype=q.dtype, device=source.device)
    rows_T = torch.arange(tokens, device=source.device) * PAGE_TOKENS + 5

    def check() -> Check:
        ours = rope_write_kv(q, k, v, cos, sin, pages[0], pages[1], rows_T)
        true = reference.rope_write_kv(q, k, v, cos, sin, pages[2], pages[3], rows_T)
        written = torch.cat((ours.flatten(), pages[:2].flatten()))
        return close("rope_write_kv", written, torch.cat((true.flatten(), pages[2:].flatten())), roundings=1)

    steps: list[Work] = [lambda: rope_write_kv(q, k, v, cos, sin, pages[0], pages[1], rows_T)] * STEPS
    name = f"rope_write_kv, {tokens} x ({num_heads} + 2 x {num_kv_heads}) heads"
    return OpCase(name, steps, 2 * (q.nbytes + k.nbytes + v.nbytes), check)


def combine_case(source: Source, tokens: int, shape: MoEShape) -> OpCase:
    """The weighted sum of the experts' outputs."""
    y_TKH = source.random(tokens, shape.top_k, shape.hidden)
    weights_TK = torch.rand((tokens, shape.top_k), device=source.device)

    def check() -> Check:
        true = (y_TKH.double() * weights_TK.double()[..., None]).sum(1)
        return close("moe_combine", moe_combine(y_TKH, weights_TK), true, roundings=1)

    steps: list[Work] = [lambda: moe_combine(y_TKH, weights_TK)] * STEPS
    name = f"moe_combine, {tokens} x {shape.top_k} x {shape.hidden}"
    return OpCase(name, steps, y_TKH.nbytes * (1 + 1 / shape.top_k), check)


def small_builders(source: Source) -> list[Callable[[], OpCase]]:
    """Each for one token and for sixteen; the plan for a prefill too."""
    plans = [partial(plan_case, source, tokens, QWEN3) for tokens in (*PLAN_TOKENS, PREFILL_TOKENS)]
    rest = [
        builder
        for tokens in (1, 16)
        for builder in (
            partial(router_case, source, tokens, QWEN3),
            partial(router_case, source, tokens, DEEPSEEK),
            partial(norm_case, source, tokens, QWEN3.hidden),
            partial(rope_case, source, tokens),
            partial(combine_case, source, tokens, QWEN3),
        )
    ]
    return [*plans, *rest]
