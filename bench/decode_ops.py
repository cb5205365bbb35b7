"""The ops of a decode step beside the experts' products: attention over the paged cache, and the small fused ones.

B sequences, H query heads, G KV heads, D head dimension, C context tokens, P pages, S tokens a page, M pages a
sequence has; in latent attention L latent and R rotary dimensions; elsewhere T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from gpu_timing import Work
from moe_operands import L2_MULTIPLE, STEPS
from moe_paths import ROUNDING_ERROR, Check, relative_error, same_plan
from moe_shapes import DECODE_TOKENS, DEEPSEEK, QWEN3, MoEShape
from shapes import PAGE_TOKENS
from torch import Tensor

from duoserve.kernels import reference
from duoserve.kernels.attention_gqa import decode_attention
from duoserve.kernels.attention_mla import mla_decode_attention
from duoserve.kernels.combine import moe_combine
from duoserve.kernels.norm import add_rms_norm
from duoserve.kernels.rope import rope_write_kv
from duoserve.kernels.route import route_plan
from duoserve.kernels.router import router_topk

ROUTE_PLAN_TARGET_US = 4.0
QWEN3_HEADS = (32, 4, 128)  # query heads, KV heads, head dimension
DEEPSEEK_LATENT = (16, 512, 64)  # query heads, latent and rotary dimensions
CONTEXTS = ((1, 4096), (1, 32768), (16, 4096))  # sequences, tokens of each


@dataclass(frozen=True)
class OpCase:
    """One op: its ``steps`` in rotation, the bytes that one moves, how it is checked, and others that do the same."""

    name: str
    steps: list[Work]
    nbytes: float
    check: Callable[[], Check]
    target_us: float | None = None
    peers: dict[str, list[Work]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where operands live, and the size of the cache that rotation has to pass."""

    device: str
    l2_bytes: int

    def random(self, *shape: int) -> Tensor:
        """Normal bf16 numbers."""
        return torch.randn(shape, device=self.device).bfloat16()

    def rotation(self, step_bytes: float) -> int:
        """How many sets of operands of ``step_bytes`` pass the cache."""
        return max(2, int(-(-L2_MULTIPLE * self.l2_bytes // step_bytes)))

    def tables(self, count: int, batch: int, context: int) -> Tensor:
        """Page tables [count, B, M] that share no page, the pages in no order."""
        pages = context // PAGE_TOKENS
        order = torch.randperm(count * batch * pages, device=self.device)
        return order.int().view(count, batch, pages)


def attention_case(source: Source, batch: int, context: int, heads: tuple[int, int, int] = QWEN3_HEADS) -> OpCase:
    """Grouped-query attention of one new token a sequence."""
    num_heads, num_kv_heads, dim = heads
    step_bytes = 2 * 2 * batch * context * num_kv_heads * dim
    count = source.rotation(step_bytes)
    tables = source.tables(count, batch, context)
    k_PSGD, v_PSGD = (source.random(tables.numel(), PAGE_TOKENS, num_kv_heads, dim) for _ in range(2))
    q_BHD = source.random(batch, num_heads, dim)
    lengths_B = torch.full((batch,), context, dtype=torch.int32, device=source.device)
    steps: list[Work] = [
        lambda table=table: decode_attention(q_BHD, k_PSGD, v_PSGD, table, lengths_B, dim**-0.5) for table in tables
    ]

    def contiguous(pages_PSGD: Tensor, table_BM: Tensor) -> Tensor:
        return pages_PSGD[table_BM.long()].flatten(1, 2).transpose(1, 2).contiguous()  # [B, G, C, D]

    def check() -> Check:
        k, v = (contiguous(pages, tables[0]).double() for pages in (k_PSGD, v_PSGD))
        q = q_BHD.double().view(batch, num_kv_heads, -1, dim)
        true = (q @ k.transpose(2, 3) * dim**-0.5).softmax(-1) @ v
        return _close("decode_attention", steps[0]().view_as(true), true, roundings=2)

    caches = [(contiguous(k_PSGD, table), contiguous(v_PSGD, table)) for table in tables]
    sdpa: list[Work] = [
        lambda k=k, v=v: F.scaled_dot_product_attention(q_BHD[:, :, None], k, v, enable_gqa=True) for k, v in caches
    ]
    name = f"decode_attention, {batch} x {context} tokens, {num_heads} heads on {num_kv_heads}"
    return OpCase(name, steps, step_bytes, check, peers={"F.scaled_dot_product_attention, contiguous": sdpa})


def latent_case(source: Source, batch: int, context: int, sizes: tuple[int, int, int] = DEEPSEEK_LATENT) -> OpCase:
    """Multi-head latent attention of one new token a sequence."""
    num_heads, latent, rope = sizes
    step_bytes = 2 * batch * context * (latent + rope)
    tables = source.tables(source.rotation(step_bytes), batch, context)
    pages_PSW = source.random(tables.numel(), PAGE_TOKENS, latent + rope)
    q_BHL, q_BHR = source.random(batch, num_heads, latent), source.random(batch, num_heads, rope)
    lengths_B = torch.full((batch,), context, dtype=torch.int32, device=source.device)
    scale = (latent + rope) ** -0.5
    steps: list[Work] = [
        lambda table=table: mla_decode_attention(q_BHL, q_BHR, pages_PSW, table, lengths_B, scale) for table in tables
    ]

    def check() -> Check:
        rows_BCW = pages_PSW[tables[0].long()].flatten(1, 2).double()
        scores = torch.cat((q_BHL, q_BHR), dim=-1).double() @ rows_BCW.transpose(1, 2) * scale
        return _close("mla_decode_attention", steps[0](), scores.softmax(-1) @ rows_BCW[..., :latent], roundings=2)

    name = f"mla_decode_attention, {batch} x {context} tokens, {num_heads} heads"
    return OpCase(name, steps, step_bytes, check)


def plan_case(source: Source, tokens: int, shape: MoEShape) -> OpCase:
    """The routing plan of one layer."""
    ids_TK = torch.rand((tokens, shape.experts), device=source.device).topk(shape.top_k, dim=1).indices.contiguous()
    slots_E = torch.randperm(shape.experts, device=source.device).int()

    def check() -> Check:
        same = same_plan(route_plan(ids_TK, slots_E), reference.route_plan(ids_TK, slots_E))
        return Check("route_plan", float(not same), 0.0)

    target = ROUTE_PLAN_TARGET_US if tokens <= max(DECODE_TOKENS) else None
    steps: list[Work] = [lambda: route_plan(ids_TK, slots_E)] * STEPS
    return OpCase(f"route_plan, {tokens} tokens of {shape.name}", steps, 12.0 * ids_TK.numel(), check, target)


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
        return _close("add_rms_norm", torch.cat(ours), torch.cat(true), roundings=2)

    steps: list[Work] = [lambda: add_rms_norm(x_TH, residual_TH, weight_H, 1e-6)] * STEPS
    return OpCase(f"add_rms_norm, {tokens} x {hidden}", steps, 4 * x_TH.nbytes, check)


def rope_case(source: Source, tokens: int, heads: tuple[int, int, int] = QWEN3_HEADS) -> OpCase:
    """Rotation of queries and keys, and the write of keys and values to the cache."""
    num_heads, num_kv_heads, dim = heads
    q, k, v = (source.random(tokens, count, dim) for count in (num_heads, num_kv_heads, num_kv_heads))
    cos, sin = reference.rope_table(torch.arange(tokens, device=source.device) + 1000, dim, 1e6, torch.bfloat16)
    pages = torch.zeros((4, tokens, PAGE_TOKENS, num_kv_heads, dim), dtype=q.dtype, device=source.device)
    rows_T = torch.arange(tokens, device=source.device) * PAGE_TOKENS + 5

    def check() -> Check:
        ours = rope_write_kv(q, k, v, cos, sin, pages[0], pages[1], rows_T)
        true = reference.rope_write_kv(q, k, v, cos, sin, pages[2], pages[3], rows_T)
        out, expected = (
            torch.cat((ours.flatten(), pages[:2].flatten())),
            torch.cat((true.flatten(), pages[2:].flatten())),
        )
        return _close("rope_write_kv", out, expected, roundings=1)

    steps: list[Work] = [lambda: rope_write_kv(q, k, v, cos, sin, pages[0], pages[1], rows_T)] * STEPS
    name = f"rope_write_kv, {tokens} tokens, {num_heads} and {num_kv_heads} heads"
    return OpCase(name, steps, 2 * (q.nbytes + k.nbytes + v.nbytes), check)


def combine_case(source: Source, tokens: int, shape: MoEShape) -> OpCase:
    """The weighted sum of the experts' outputs."""
    y_TKH = source.random(tokens, shape.top_k, shape.hidden)
    weights_TK = torch.rand((tokens, shape.top_k), device=source.device)

    def check() -> Check:
        true = (y_TKH.double() * weights_TK.double()[..., None]).sum(1)
        return _close("moe_combine", moe_combine(y_TKH, weights_TK), true, roundings=1)

    steps: list[Work] = [lambda: moe_combine(y_TKH, weights_TK)] * STEPS
    return OpCase(f"moe_combine, {tokens} tokens of {shape.name}", steps, y_TKH.nbytes * (1 + 1 / shape.top_k), check)


def attention_cases(source: Source, longest: int) -> Iterator[OpCase]:
    """Both kinds of attention; contexts up to ``longest`` tokens. Built one at a time: their caches are large."""
    for batch, context in CONTEXTS:
        if context <= longest:
            yield attention_case(source, batch, context)
            yield latent_case(source, batch, context)


def small_cases(source: Source) -> Iterator[OpCase]:
    """The small ops of a decode step; what they read is in the L2 cache, where the op before has left it."""
    yield from (plan_case(source, tokens, QWEN3) for tokens in (*DECODE_TOKENS, 32768))
    for tokens in (1, 16):
        yield router_case(source, tokens, QWEN3)
        yield router_case(source, tokens, DEEPSEEK)
        yield norm_case(source, tokens, QWEN3.hidden)
        yield rope_case(source, tokens)
        yield combine_case(source, tokens, QWEN3)


def _close(name: str, ours: object, true: Tensor, roundings: int) -> Check:
    assert isinstance(ours, Tensor)
    return Check(name, relative_error(ours, true), roundings * ROUNDING_ERROR)
