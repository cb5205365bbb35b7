"""The written search space of the tuner: what each field of a row may be, and which rows can run at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from duoserve.kernels.configs import GemmConfig, GemvConfig, gemm_config, gemv_config
from duoserve.kernels.weights import ExpertFormat

Config = TypeVar("Config", GemmConfig, GemvConfig)
Space = dict[str, tuple[int, ...]]

KIB = 1024
# Shared memory that the CTAs of one multiprocessor have together, each of them 1 KiB of it for the system.
SHARED_BYTES = {80: 164 * KIB, 86: 100 * KIB, 89: 100 * KIB, 90: 228 * KIB, 100: 228 * KIB, 120: 100 * KIB}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65536
OTHER_REGISTERS = 32  # of a thread, beside its sums: addresses and operands, at the least
MAX_SUMS, MAX_SCALED_SUMS, MAX_GEMV_SUMS = 128, 64, 32  # of a thread; formats with a scale for each step have two sets
MIN_SUMS, MIN_GEMV_SUMS = 16, 4  # below these more warps than 4, or any at all, have too little to do
GROUPED = (ExpertFormat.INT4, ExpertFormat.FP8, ExpertFormat.MXFP4)
# Of a weight; others have 1.
BYTES = {ExpertFormat.FLOAT: 2.0, ExpertFormat.INT4: 0.5, ExpertFormat.MXFP4: 0.5, ExpertFormat.BF12: 1.5}
GEMV_SPACE: Space = {
    "block_n": (2, 4, 8, 16),
    "block_k": (128, 256, 512, 1024),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5, 6, 8),
}


@dataclass(frozen=True)
class Corner:
    """One entry of the table: weights' format, architecture, shape class; ``inner`` is the dimension summed over."""

    format: ExpertFormat
    arch: int
    block_t: int
    inner: int

    def gemm_space(self) -> Space:
        """Values of every field; BK is free where it changes no bits of a row, TMA where there is any to use."""
        space: Space = {
            "ctas_per_sm": (1, 2, 3, 4, 6),
            "num_stages": (2, 3, 4, 5, 6, 7),
            "block_n": (64, 128),
            "num_warps": (4, 8),
            "group_t": (1, 4, 8, 16),
            "block_t": tuple(sorted({max(16, self.block_t // share) for share in (1, 2, 4)})),
        }
        if self.format not in (*GROUPED, ExpertFormat.BF12):
            space["block_k"] = (32, 64, 128)
        if self.arch in (90, 100) and self.format is not ExpertFormat.BF12:
            space["tma"] = (False, True)
        return space

    def gemm_fault(self, config: GemmConfig) -> str | None:
        """Why a row cannot run or is bound to spill; None where nothing speaks against it."""
        ctas, threads = config.ctas_per_sm, 32 * config.num_warps
        weights = config.block_n * config.block_k * BYTES.get(self.format, 1.0)
        shared = config.num_stages * (weights + 2 * config.block_t * config.block_k) + KIB
        sums = config.block_n * config.block_t // threads
        grouped = self.format in GROUPED
        registers = sums * (2 if grouped else 1) + OTHER_REGISTERS
        faults = {
            f"{ctas} CTAs of {shared / KIB:.0f} KiB of shared memory": ctas * shared > SHARED_BYTES[self.arch],
            f"{ctas} CTAs of {threads} threads": ctas * threads > THREADS[self.arch],
            f"{ctas} CTAs with {registers} registers a thread": ctas * threads * registers > REGISTERS,
            f"{sums} sums a thread spill": sums > (MAX_SCALED_SUMS if grouped else MAX_SUMS),
            f"{sums} sums a thread are too few": config.num_warps > 4 and sums < MIN_SUMS,
        }
        return next((fault for fault, holds in faults.items() if holds), None)

    def gemv_fault(self, config: GemvConfig) -> str | None:
        """As ``gemm_fault``, for the matrix-vector kernels."""
        sums = config.block_n * config.block_k // (32 * config.num_warps)
        if not MIN_GEMV_SUMS <= sums <= MAX_GEMV_SUMS:
            return f"{sums} sums a thread"
        return f"masks: {config.block_k} does not divide {self.inner}" if self.inner % config.block_k else None

    def gemm_neighbours(self, config: GemmConfig) -> Iterator[GemmConfig]:
        """Rows that can run and differ from ``config`` in one field, and by fewer CTAs or stages where it must be."""
        fitted = (self._fitted(row) for row in _neighbours(config, self.gemm_space()))
        return (row for row in fitted if row and row != config)

    def gemv_neighbours(self, config: GemvConfig) -> Iterator[GemvConfig]:
        """As ``gemm_neighbours``."""
        return (row for row in _neighbours(config, GEMV_SPACE) if not self.gemv_fault(row))

    def _fitted(self, row: GemmConfig) -> GemmConfig | None:
        """``row`` with as many of its CTAs, and of its stages, as there is room for."""
        space = self.gemm_space()
        stages, ctas = ([n for n in space[name] if n <= getattr(row, name)] for name in ("num_stages", "ctas_per_sm"))
        for num_stages, ctas_per_sm in itertools.product(reversed(stages), reversed(ctas)):
            fewer = replace(row, num_stages=num_stages, ctas_per_sm=ctas_per_sm)
            if not self.gemm_fault(fewer):
                return fewer
        return None


def gemm_rows(corner: Corner, group: int = 0) -> list[GemmConfig]:
    """The whole space: every row that can run, for bf16 activations; ``group`` is that of int4."""
    present = gemm_config(torch.bfloat16, corner.arch, corner.block_t, True, corner.format, group)
    return [row for row in _product(present, corner.gemm_space()) if not corner.gemm_fault(row)]


def gemv_rows(corner: Corner) -> list[GemvConfig]:
    """The whole space of the matrix-vector kernels."""
    present = gemv_config(torch.bfloat16, corner.arch, corner.inner)
    return [row for row in _product(present, GEMV_SPACE) if not corner.gemv_fault(row)]


def row_text(config: Config, reason: str) -> str:
    """The row as ``duoserve/kernels/configs.py`` writes it; fields that have their default are left out."""
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "reason":
            words.append(f'"{reason}"')
        elif field.name not in ("tma", "group_t"):
            words.append(str(value))
        elif value != field.default:
            words.append(f"{field.name}={value!r}")
    return f"{type(config).__name__}({', '.join(words)})"


def _neighbours(config: Config, space: Space) -> Iterator[Config]:
    for name, values in space.items():
        for value in values:
            if value != getattr(config, name):
                yield replace(config, **{name: value})


def _product(present: Config, space: Space) -> Iterator[Config]:
    """Every combination of values, the fields outside the space as ``present`` has them."""
    for values in itertools.product(*space.values()):
        yield replace(present, **dict(zip(space, values, strict=True)))
