"""The tiles that each GEMM runs with: a table for each kind, one function that chooses, nothing tuned at run time.

T tokens, K top-k, E experts. A tile is BN weight rows by BT routed rows, BK of the inner dimension at a time. The
tables are untuned starting points until ``bench/`` has measured them on a GPU; each row says its ``reason``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from duoserve.kernels.weights import FP8_BLOCK, MXFP4_GROUP, ExpertFormat

SMALL, MEDIUM, LARGE, HUGE = 16, 64, 128, 256  # BT of the four shape classes
INTERPRETER = 0  # the "architecture" of Triton's interpreter
SM_REGISTERS = 65536  # registers of a multiprocessor, on every architecture so far
THREAD_REGISTERS = 255  # registers that an instruction can name
LEAST_REGISTERS = 32  # registers of a thread when a multiprocessor has 2048 threads, the most that it can have


def _max_registers(ctas_per_sm: int, num_warps: int) -> int:
    """Registers, a multiple of 8, that each thread may have so that ``ctas_per_sm`` CTAs share a multiprocessor."""
    share = SM_REGISTERS // (ctas_per_sm * num_warps * 32) // 8 * 8
    return max(LEAST_REGISTERS, min(THREAD_REGISTERS, share))


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and launch options of one GEMM; ``tma`` reads weights through a tensor descriptor."""

    block_n: int
    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int
    reason: str
    tma: bool = False
    group_t: int = 8  # this many tiles of routed rows share a band of weights, so that both stay in the L2 cache

    @property
    def max_registers(self) -> int:
        """A thread's registers. ptxas must be told: by itself it spills to fit more CTAs than are ever launched."""
        return _max_registers(self.ctas_per_sm, self.num_warps)


@dataclass(frozen=True)
class GemvConfig:
    """Tile sizes and launch options of one matrix-vector kernel."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int
    reason: str

    @property
    def max_registers(self) -> int:
        """A thread's registers; ptxas must be told."""
        return _max_registers(self.ctas_per_sm, self.num_warps)


# 16-bit weights by TMA into wgmma: 64 weight rows are the least that wgmma takes.
_SM90 = {
    SMALL: GemmConfig(64, 16, 64, 4, 4, 4, "decode: narrow tiles even out the last wave, 10 KB a stage, 4 CTAs", True),
    MEDIUM: GemmConfig(128, 64, 64, 4, 4, 2, "still bound by memory: 24 KB a stage, 2 CTAs", True),
    LARGE: GemmConfig(128, 128, 64, 4, 4, 1, "64 K accumulators in 4 warps leave registers for one CTA", True),
    HUGE: GemmConfig(128, 256, 64, 8, 4, 1, "bound by wgmma: the widest tile that does not spill", True),
}
# mma.sync with cp.async: 64 KB of shared memory or less a CTA, so that sm_86 and sm_89 (100 KB) take them too.
_SM80 = {
    SMALL: GemmConfig(64, 16, 64, 4, 4, 2, "decode: as on sm_90, 40 KB"),
    MEDIUM: GemmConfig(64, 64, 64, 4, 3, 2, "48 KB, 2 CTAs hide each other's epilogue"),
    LARGE: GemmConfig(128, 128, 32, 8, 4, 1, "128 accumulators a thread would spill with 4 warps; 64 KB"),
    HUGE: GemmConfig(128, 128, 32, 8, 4, 1, "a 256-wide tile leaves sm_86 no stages"),
}
# 32-bit weights multiply on the FMA units, in full precision: small tiles, bound by instructions.
_FP32 = {
    SMALL: GemmConfig(64, 16, 32, 4, 3, 2, "FMA: 8 accumulators a thread"),
    MEDIUM: GemmConfig(64, 64, 32, 8, 3, 1, "FMA: 16 accumulators a thread"),
    LARGE: GemmConfig(64, 64, 32, 8, 3, 1, "FMA: wider tiles gain nothing"),
    HUGE: GemmConfig(64, 64, 32, 8, 3, 1, "FMA: wider tiles gain nothing"),
}
# Weights are decoded in registers, which then feed wgmma or mma; sums and scaled sums take twice the accumulators.
_QUANTIZED_SM90 = {
    SMALL: GemmConfig(
        64, 16, 128, 4, 4, 3, "decode: 8 KB of int4 or 12 KB of bytes a stage; fp8 spills in 128 registers", True
    ),
    MEDIUM: GemmConfig(128, 64, 128, 8, 3, 1, "32 + 32 sums a thread and a K of 128 spill in 4 warps", True),
    LARGE: GemmConfig(128, 128, 128, 8, 3, 1, "64 + 64 sums a thread in 8 warps", True),
    HUGE: GemmConfig(128, 128, 128, 8, 3, 1, "a 256-wide tile would spill with two sets of sums", True),
}
_QUANTIZED_SM80 = {
    SMALL: GemmConfig(64, 16, 64, 4, 4, 2, "decode: 4 KB of weights or less a stage"),
    MEDIUM: GemmConfig(64, 64, 64, 4, 3, 2, "16 + 16 sums a thread"),
    LARGE: GemmConfig(128, 64, 64, 8, 3, 1, "16 + 16 sums a thread; weights decoded once for 64 rows"),
    HUGE: GemmConfig(128, 64, 64, 8, 3, 1, "with 128 rows an int4 group of 128 spills"),
}
# Weights are decoded in registers too, with one set of sums, and read through pointers. A step takes columns from both
# halves of a row, so BK determines the order in which columns are summed: all rows of a table have the same.
_BF12_SM90 = {
    SMALL: GemmConfig(64, 16, 128, 4, 4, 3, "decode: 12 KB of weights a stage, 3 CTAs"),
    MEDIUM: GemmConfig(128, 64, 128, 8, 4, 1, "still bound by memory: 40 KB a stage, 1 CTA"),
    LARGE: GemmConfig(128, 128, 128, 8, 3, 1, "64 sums a thread; weights decoded once for 128 rows"),
    HUGE: GemmConfig(128, 128, 128, 8, 3, 1, "256 rows take 88 KB a stage: two would be all"),
}
_BF12_SM80 = {
    SMALL: GemmConfig(64, 16, 64, 4, 4, 2, "decode: 6 KB of weights a stage"),
    MEDIUM: GemmConfig(64, 64, 64, 4, 3, 2, "32 sums a thread, 14 KB a stage"),
    LARGE: GemmConfig(128, 64, 64, 8, 3, 1, "as other formats that are decoded"),
    HUGE: GemmConfig(128, 64, 64, 8, 3, 1, "as other formats that are decoded"),
}


def shape_class(num_tokens: int, top_k: int, num_experts: int) -> int:
    """BT for T * K routed rows: near the mean number of rows of an expert, and no more than the tokens can fill."""
    mean_rows = num_tokens * top_k / num_experts
    if num_tokens <= SMALL or mean_rows <= SMALL / 2:
        return SMALL
    if mean_rows <= MEDIUM * 0.75:
        return MEDIUM
    return LARGE if mean_rows <= LARGE * 1.5 else HUGE


def gemm_config(
    dtype: torch.dtype,
    arch: int,
    block_t: int,
    tma_fits: bool = True,
    format: ExpertFormat = ExpertFormat.FLOAT,
    group: int = 0,
) -> GemmConfig:
    """The tiles of ``moe_up`` and ``moe_down`` for activations of ``dtype`` and weights of ``format``.

    ``arch`` is 10 * major + minor of the compute capability or INTERPRETER; ``block_t`` comes from ``shape_class``;
    ``tma_fits`` says that strides and addresses are multiples of 16 bytes, as a descriptor needs. Every row adds up
    its inner dimension in the same order whatever BT is, so all rows of one (dtype, arch) are batch-invariant.
    """
    no_wgmma = arch < 90 or arch // 10 == 12  # consumer Blackwell has mma.sync and 100 KB of shared memory
    if dtype == torch.float32:
        config = _FP32[block_t]
    elif format is ExpertFormat.FLOAT:
        config = (_SM80 if no_wgmma else _SM90)[block_t]
    elif format is ExpertFormat.BF12:
        config = (_BF12_SM80 if no_wgmma else _BF12_SM90)[block_t]
    else:
        config = (_QUANTIZED_SM80 if no_wgmma else _QUANTIZED_SM90)[block_t]
    config = config if tma_fits else replace(config, tma=False)
    if dtype == torch.float32:  # a step's products are unrolled: steps of a whole group of 128 would spill
        return config
    block_k = scale_group(format, group) or config.block_k
    # A narrow step reads few bytes, so more steps are under way.
    more = 2 if format is not ExpertFormat.FLOAT and block_k == MXFP4_GROUP else 0
    return replace(config, block_k=block_k, num_stages=config.num_stages + more)


def scale_group(format: ExpertFormat, group: int) -> int:
    """The number of a row's weights that share a scale, which is the most that a step takes; 0: no limit."""
    fixed = {ExpertFormat.INT4: group, ExpertFormat.MXFP4: MXFP4_GROUP, ExpertFormat.FP8: FP8_BLOCK}
    return fixed.get(format, 0)


def gemv_config(dtype: torch.dtype, arch: int, inner: int) -> GemvConfig:
    """The tiles of ``moe_gemv_up`` (``inner`` is H) and ``moe_gemv_down`` (I), on every ``arch`` so far.

    BK is the largest power of two from 128 to 512 that divides ``inner``, so that no load has a mask; if none does, it
    is 256 with masks. Stages make up for a narrow BK: 14 to 16 KB of loads are under way in every CTA.
    """
    del arch
    exact = [block_k for block_k in (512, 256, 128) if inner % block_k == 0]
    block_k = exact[0] if exact else 256
    block_n = 4 if dtype == torch.float32 else 8
    num_stages = {512: 3, 256: 5, 128: 8}[block_k]
    return GemvConfig(block_n, block_k, 4, num_stages, 5, "8 to 32 sums a thread, 16-byte loads, 16 KB under way")
