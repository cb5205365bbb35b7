"""Launches of every kernel, with operands of models' shapes and no memory, for the machine-code gate to compile.

T tokens, K top-k, E experts, S slots, H hidden, I expert intermediate, R = T * K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from duoserve.experts.layout import ExpertLayout
from duoserve.kernels import (
    HostWork,
    attention_gqa,
    attention_mla,
    cache_rows,
    combine,
    copies,
    moe_fill,
    moe_gemm,
    moe_gemv,
    norm,
    rope,
    route_sort,
    router_choice,
)
from duoserve.kernels.configs import (
    HUGE,
    LARGE,
    MEDIUM,
    SMALL,
    GemmConfig,
    GemvConfig,
    gemm_config,
    gemv_config,
    shape_class,
)
from duoserve.kernels.host_rows import HostRows
from duoserve.kernels.weights import ExpertFormat
from tests.kernels.experts_case import TINY
from tests.kernels.launch_operands import BF16, EXPERTS, FP16, FP32, NUM_SLOTS, TOP_K, clamp, expert_weights, routing
from tests.kernels.quantized_case import LAYOUTS

NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
NUM_SMS = 132
FEW_EXPERTS = 32  # of which 64 tokens choose so many rows each that their tiles are MEDIUM
HIDDEN, INTER = 2048, 768
TOKENS = {SMALL: 16, MEDIUM: 512, LARGE: 2048, HUGE: 8192}  # of each shape class with TOP_K of EXPERTS
FORMATS = ((ExpertFormat.FLOAT, 0), *LAYOUTS)
ENDS = tuple(format for format in FORMATS if format != (ExpertFormat.INT4, 64))  # without what lies between two others


def launch(name: str, arch: int) -> None:
    """Launches as on a GPU of ``arch``, with tensors that have no memory."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        for module in (moe_gemm, moe_gemv, moe_fill, copies):
            stack.enter_context(patch.object(module, "machine", lambda device: (arch, NUM_SMS)))
        LAUNCHES[name](arch)


@dataclass(frozen=True)
class Gemm:
    """``moe_up`` or ``moe_down`` with one row of the tables; where ``tma`` does not hold, the row without TMA."""

    up: bool
    dtype: torch.dtype
    format: ExpertFormat
    group: int
    block_t: int
    tma: bool = True
    inter: int = INTER
    clamped: bool = False

    def __str__(self) -> str:
        side = "clamped" if self.clamped else "up" if self.up else "down"
        shape = (
            side, NAMES[self.dtype], self.format.value, self.group or "",
            self.block_t, "" if self.tma else "pointers",
        )  # fmt: skip
        return "-".join(str(part) for part in shape if part)

    def config(self, arch: int) -> GemmConfig:
        """The row, as the table has it."""
        return gemm_config(self.dtype, arch, self.block_t, self.tma, self.format, self.group)

    def __call__(self, arch: int) -> None:
        self.launch(None if self.tma else self.config(arch))

    def launch(self, config: GemmConfig | None) -> None:
        """With another row, unless ``config`` is None."""
        tokens = TOKENS[self.block_t]
        rows_RI = torch.empty(tokens * TOP_K, self.inter, dtype=self.dtype)
        weights, plan = expert_weights(self.dtype, self.format, self.group, HIDDEN, self.inter), routing(tokens)
        if self.up:
            x_TH = torch.empty(tokens, HIDDEN, dtype=self.dtype)
            moe_gemm.moe_up(x_TH, weights, plan, plan.resident, rows_RI, clamp(self.clamped, self.inter), config)
        else:
            y_RH = torch.empty(tokens * TOP_K, HIDDEN, dtype=self.dtype)
            moe_gemm.moe_down(rows_RI, weights, plan, plan.resident, y_RH, config)


@dataclass(frozen=True)
class Gemv:
    """``moe_gemv_up`` or ``moe_gemv_down`` of one token."""

    up: bool
    dtype: torch.dtype
    hidden: int
    inter: int

    def __str__(self) -> str:
        return f"gemv-{'up' if self.up else 'down'}-{NAMES[self.dtype]}-{self.hidden if self.up else self.inter}"

    def config(self, arch: int) -> GemvConfig:
        """The row, as the table has it."""
        return gemv_config(self.dtype, arch, self.hidden if self.up else self.inter)

    def __call__(self, arch: int) -> None:
        del arch
        weights = expert_weights(self.dtype, ExpertFormat.FLOAT, 0, self.hidden, self.inter)
        x_1H, act_KI = torch.empty(1, self.hidden, dtype=self.dtype), torch.empty(TOP_K, self.inter, dtype=self.dtype)
        slots_K = torch.empty(TOP_K, dtype=torch.int32)
        if self.up:
            moe_gemv.moe_gemv_up(x_1H, weights, slots_K, act_KI)
        else:
            moe_gemv.moe_gemv_down(act_KI, weights, slots_K, torch.empty(1, TOP_K), x_1H, torch.empty_like(x_1H))


@dataclass(frozen=True)
class Fill:
    """``moe_up_fill`` or ``moe_down_fill``."""

    up: bool
    dtype: torch.dtype
    format: ExpertFormat
    group: int
    tokens: int
    clamped: bool = False

    def __str__(self) -> str:
        side = "clamped" if self.clamped else "up" if self.up else "down"
        parts = "fill", side, NAMES[self.dtype], self.format.value, self.group or "", self.tokens
        return "-".join(str(part) for part in parts if part)

    def config(self, arch: int) -> GemmConfig:
        """The row, as the op chooses it."""
        block_t = shape_class(self.tokens, TOP_K, FEW_EXPERTS)
        return moe_fill.fill_config(self.dtype, arch, block_t, self.format, self.group)

    def __call__(self, arch: int) -> None:
        del arch
        weights = expert_weights(self.dtype, self.format, self.group, HIDDEN, INTER)
        plan = routing(self.tokens, FEW_EXPERTS)
        source = HostRows((None,) * FEW_EXPERTS, torch.empty(FEW_EXPERTS, dtype=torch.int64))
        rows_RI = torch.empty(self.tokens * TOP_K, INTER, dtype=self.dtype)
        if self.up:
            x_TH = torch.empty(self.tokens, HIDDEN, dtype=self.dtype)
            clamped = clamp(self.clamped, INTER, FEW_EXPERTS)
            moe_fill.moe_up_fill(x_TH, weights, source, plan, plan.missing, rows_RI, clamped)
        else:
            y_RH = torch.empty(self.tokens * TOP_K, HIDDEN, dtype=self.dtype)
            moe_fill.moe_down_fill(rows_RI, weights, source, plan, plan.missing, y_RH)


def plan(tokens: int, top_k: int, experts: int) -> None:
    route_sort.route_plan(torch.empty(tokens, top_k, dtype=torch.int64), torch.empty(experts, dtype=torch.int32))


def combined(dtype: torch.dtype, shared: bool) -> None:
    shared_TH = torch.empty(4, 4096, dtype=dtype) if shared else None
    combine.moe_combine(torch.empty(4, TOP_K, 4096, dtype=dtype), torch.empty(4, TOP_K), shared_TH)


def normed(dtype: torch.dtype, hidden: int, residual: bool) -> None:
    x_TH, weight_H = torch.empty(64, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
    if residual:
        norm.add_rms_norm(x_TH, torch.empty_like(x_TH), weight_H, 1e-5)
    else:
        norm.rms_norm(x_TH, weight_H, 1e-5)


def rotated(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, turned: int, interleaved: bool = False) -> None:
    qkv = torch.empty(4, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    cos, sin = (torch.empty(4, 1, turned // 2, dtype=dtype) for _ in range(2))
    k_pages, v_pages = (torch.empty(8, 64, kv_heads, dim, dtype=dtype) for _ in range(2))
    rope.rope_write_kv(q, k, v, cos, sin, k_pages, v_pages, torch.empty(4, dtype=torch.int64), interleaved)


def written(dtype: torch.dtype, width: int) -> None:
    values_TW, pages_PSW = torch.empty(4, width, dtype=dtype), torch.empty(8, 64, width, dtype=dtype)
    cache_rows.write_rows(values_TW, pages_PSW, torch.empty(4, dtype=torch.int64))


def routed(experts: int, top_k: int, dtype: torch.dtype = BF16, bias: bool = False, **options: Any) -> None:
    bias_E = torch.empty(experts) if bias else None
    router_choice.router_topk(torch.empty(8, experts, dtype=dtype), top_k, bias_E=bias_E, **options)


def attended(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None = None, sinks: bool = False
) -> None:
    pages = torch.empty(64, 64, kv_heads, dim, dtype=dtype)
    table, lengths = torch.empty(4, 64, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    sinks_H = torch.empty(heads, dtype=dtype) if sinks else None
    q_BHD = torch.empty(4, heads, dim, dtype=dtype)
    attention_gqa.decode_attention(q_BHD, pages, torch.empty_like(pages), table, lengths, 0.1, window, sinks_H)


def attended_latents(dtype: torch.dtype, heads: int) -> None:
    q_latent, q_rope = torch.empty(4, heads, 512, dtype=dtype), torch.empty(4, heads, 64, dtype=dtype)
    table, lengths = torch.empty(4, 64, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    pages = torch.empty(64, 64, 576, dtype=dtype)
    attention_mla.mla_decode_attention(q_latent, q_rope, pages, table, lengths, 0.1)


def gathered() -> None:
    source = HostRows((None,) * EXPERTS, torch.empty(EXPERTS, dtype=torch.int64))
    layout = ExpertLayout(BF16, HIDDEN, INTER)
    copies.page_gather(source, routing(1).missing, torch.empty(NUM_SLOTS, layout.slot_bytes, dtype=torch.uint8))


BOTH = (True, False)
GEMMS = {
    str(gemm): gemm
    for gemm in (
        *(Gemm(True, BF16, *format, block_t) for format in FORMATS for block_t in TOKENS),
        *(Gemm(False, BF16, *format, block_t) for format in ENDS for block_t in TOKENS),
        *(Gemm(False, BF16, *FORMATS[0], block_t, tma=False) for block_t in TOKENS),
        # Of float16 only the decoding differs; float32 has one tile for a few rows and one for many.
        *(Gemm(True, FP16, *format, MEDIUM) for format in ENDS[1:]),
        *(Gemm(up, FP32, *format, MEDIUM if up else SMALL) for format in ENDS for up in BOTH),
        *(Gemm(True, BF16, *form, tile, clamped=True) for form in (FORMATS[0], FORMATS[6]) for tile in TOKENS),
    )
}
# Mixtral, Qwen3-30B-A3B, and the odd width of DeepSeek-V2-Lite.
GEMVS = {
    str(gemv): gemv
    for gemv in (
        Gemv(up, dtype, hidden, inter)
        for hidden, inter in ((4096, 14336), (2048, 768), (2048, 1408))
        for dtype in ((BF16, FP32) if inter == 768 else (BF16,))
        for up in BOTH
    )
}
FILLS = {
    str(fill): fill
    for fill in (
        *(Fill(up, BF16, *FORMATS[0], tokens) for tokens in (1, 64) for up in BOTH),
        *(Fill(True, BF16, *format, MEDIUM) for format in FORMATS[3:]),
        *(Fill(True, FP32, *format, SMALL) for format in (FORMATS[0], FORMATS[4], FORMATS[7])),
        *(Fill(True, BF16, *FORMATS[6], tokens, clamped=True) for tokens in (1, 64)),
    )
}
SMALL_KERNELS: dict[str, Callable[[], None]] = {
    "route-1x2-of-8": partial(plan, 1, 2, 8),
    "route-8x8-of-128": partial(plan, 8, 8, 128),
    "route-64x8-of-256": partial(plan, 64, 8, 256),
    "route-51x10-of-512": partial(plan, 51, 10, 512),
    "route-4096x8-of-128": partial(plan, 4096, 8, 128),
    "page-gather": gathered,
    "combine-bf16-shared": partial(combined, BF16, True),
    "combine-fp32": partial(combined, FP32, True),
    "norm-bf16-128": partial(normed, BF16, 128, False),
    "add-norm-bf16-4096": partial(normed, BF16, 4096, True),
    "add-norm-bf16-7168": partial(normed, BF16, 7168, True),
    "add-norm-fp32-32768": partial(normed, FP32, 32768, True),
    "rope-bf16-mixtral": partial(rotated, BF16, 32, 8, 128, 128),
    "rope-bf16-interleaved": partial(rotated, BF16, 16, 1, 64, 64, True),
    "rope-fp32-qwen": partial(rotated, FP32, 32, 4, 128, 128),
    "write-rows-bf16-576": partial(written, BF16, 576),
    "router-mixtral": partial(routed, 8, 2),
    "router-qwen3": partial(routed, 128, 8, round_to=BF16),
    "router-deepseek-v3": partial(
        routed, 256, 8, FP32, bias=True, scoring="sigmoid", n_group=8, topk_group=4, scale=2.5
    ),
    "router-gpt-oss": partial(routed, 128, 4, scoring="softmax_of_topk"),
    "router-4096": partial(routed, 4096, 16),
    "attention-bf16-gpt-oss": partial(attended, BF16, 64, 8, 64, 128, True),
    "attention-fp16-128": partial(attended, FP16, 32, 8, 128),
    "attention-bf16-256": partial(attended, BF16, 16, 4, 256),
    "attention-fp32-128": partial(attended, FP32, 32, 8, 128),
    "mla-bf16-128": partial(attended_latents, BF16, 128),
    "mla-fp32-16": partial(attended_latents, FP32, 16),
}


def _ignoring_arch(launch: Callable[[], None]) -> Callable[[int], None]:
    return lambda arch: launch()


def _up_with(**changes: int) -> Callable[[int], None]:
    """``moe_up`` with the widest row of the table, changed."""

    def launch(arch: int) -> None:
        gemm = GEMMS["up-bf16-float-256"]
        gemm.launch(replace(gemm.config(arch), **changes))

    return launch


def _unaligned(arch: int) -> None:
    """``moe_down`` of rows that begin on 8 bytes."""
    Gemm(False, BF16, ExpertFormat.FLOAT, 0, MEDIUM, tma=False, inter=1412)(arch)


def _unwaited(arch: int) -> None:
    """``moe_up`` of int8 whose steps do not wait for their sums, as they need not without wgmma."""
    gemm = GEMMS["up-bf16-int8-64"]
    with patch.object(moe_gemm, "machine", lambda device: (80, NUM_SMS)):
        gemm.launch(gemm.config(arch))


def _crowded(arch: int) -> None:
    """``moe_up`` with so many CTAs that no multiprocessor has room for them."""
    GEMMS["up-bf16-float-16"].launch(replace(TINY, ctas_per_sm=100))


def _lists(arch: int) -> None:
    """``moe_up`` with lists that the host has made, of many lengths, for many numbers of rows."""
    del arch
    with torch.device("cpu"):  # whose memory has addresses
        weights = expert_weights(BF16, ExpertFormat.FLOAT, 0, 64, 64)
        for tokens in (1, 2, 3, 4, 5, 8, 17, 40):
            work = HostWork.of([(expert, 0) for expert in range(tokens)])
            x_TH, rows_RI = torch.empty(tokens, 64, dtype=BF16), torch.empty(tokens * TOP_K, 64, dtype=BF16)
            moe_gemm.moe_up(x_TH, weights, routing(tokens), work, rows_RI)


def _read_through(tokens: int, layer: int) -> None:
    """``moe_up_fill`` of a layer's list behind those of other layers with an odd number of experts."""
    experts = 35
    weights, plan = expert_weights(BF16, ExpertFormat.FLOAT, 0, 64, 64), routing(tokens, experts)
    work = replace(plan.missing, slots_W=torch.empty(layer + 1, experts, dtype=torch.int32)[layer])
    source = HostRows((None,) * experts, torch.empty(experts, dtype=torch.int64))
    x_TH, rows_RI = torch.empty(tokens, 64, dtype=BF16), torch.empty(tokens * TOP_K, 64, dtype=BF16)
    moe_fill.moe_up_fill(x_TH, weights, source, plan, work, rows_RI)


WIDTHS = (1, 2, 8, 16, 32, 33, 40, 64)  # of page tables


def _sizes(arch: int) -> None:
    """Plans of so many rows as one power of two holds, read-through of many rows, attention with many page tables."""
    del arch
    with torch.device("cpu"):  # whose memory has addresses
        for tokens in (33, 40, 48, 64):
            plan(tokens, 1, 8)
        for tokens, layer in ((1, 0), (7, 1), (8, 2), (16, 3)):
            _read_through(tokens, layer)
        for columns in WIDTHS:
            q_BHD, pages = torch.empty(4, 8, 64, dtype=BF16), torch.empty(4, 64, 2, 64, dtype=BF16)
            table, lengths = torch.empty(4, columns, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
            attention_gqa.decode_attention(q_BHD, pages, torch.empty_like(pages), table, lengths, 0.1)


def _latent_sizes(arch: int) -> None:
    """Attention over latents with many page tables."""
    del arch
    with torch.device("cpu"):  # whose memory has addresses
        for columns in WIDTHS:
            q_latent, q_rope = torch.empty(4, 16, 512, dtype=BF16), torch.empty(4, 16, 64, dtype=BF16)
            table, lengths = torch.empty(4, columns, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
            pages = torch.empty(64, 64, 576, dtype=BF16)
            attention_mla.mla_decode_attention(q_latent, q_rope, pages, table, lengths, 0.1)


# What the gate must refuse, so that it is seen to.
SPILLING = {"huge-tile": _up_with(num_warps=4, block_t=256), "few-registers": _up_with(ctas_per_sm=4)}
LAUNCHES: dict[str, Callable[[int], None]] = {
    **GEMMS,
    **GEMVS,
    **SPILLING,
    "unaligned": _unaligned,
    "unwaited": _unwaited,
    "crowded": _crowded,
    "lists": _lists,
    "sizes": _sizes,
    "latent-sizes": _latent_sizes,
    **FILLS,
    **{name: _ignoring_arch(launch) for name, launch in SMALL_KERNELS.items()},
}
