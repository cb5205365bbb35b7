"""The gate on machine code: what ptxas makes of every configuration, for three architectures and without a GPU.

Tensor cores where they should be and nowhere else, nothing spilled, registers and shared memory within what the row
says, and loads as wide as the tile allows: 16 bytes a thread, or TMA. Also that nothing is written to registers which
tensor cores still read: that is for every compiler, the rest for one version's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch

from duoserve.kernels import moe_fill
from duoserve.kernels.configs import LEAST_REGISTERS, GemmConfig
from duoserve.kernels.weights import ExpertFormat
from tests.kernels.launches import FILLS, GEMMS, GEMVS, SMALL_KERNELS, SPILLING, Fill, Gemm, Gemv
from tests.kernels.machine_code import TENSOR_CORES, Compiler, MachineCode

ARCHES = (80, 90, 100)
MULTIPLIES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# KiB of a multiprocessor, of which each CTA loses one, and the most that one CTA may have. What compiles for sm_80 runs
# on sm_86 and sm_89 too, where a CTA has 99.
SM_KIB = {80: 164, 90: 228, 100: 228}
CTA_KIB = {80: 99, 90: 227, 100: 227}
WIDEST = 16  # bytes that a thread loads at a time
BITS = {ExpertFormat.INT8: 8, ExpertFormat.FP8: 8, ExpertFormat.INT4: 4, ExpertFormat.MXFP4: 4, ExpertFormat.BF12: 12}


@dataclass(frozen=True)
class Budget:
    """What a kernel may take, and what its hot loop must have.

    ``tensor_cores`` is the instruction that multiplies, None for a kernel that does without. ``loads`` says how many
    loads of at least so many bytes a thread has; ``tma`` that it has TMA.
    """

    registers: int
    shared_kib: float
    tensor_cores: str | None = None
    loads: dict[int, int] = field(default_factory=dict)
    tma: bool = False


def faults(code: MachineCode, budget: Budget) -> list[str]:
    """What breaks the budget, in words."""
    cores, spills = budget.tensor_cores, code.count("LDL", "STL")
    found = [
        (spills or code.local_bytes, f"spills: {spills} local loads and stores, {code.local_bytes} bytes"),
        (code.registers > budget.registers, f"{code.registers} registers, not {budget.registers}"),
        (code.shared_bytes > budget.shared_kib * 1024, f"{code.shared_bytes} bytes, not {budget.shared_kib} KiB"),
        (cores and not code.count(cores, loop=True), f"no {cores} in the hot loop"),
        (code.count(*(set(TENSOR_CORES) - {cores})), f"other tensor cores than {cores}: {code.code}"),
        (budget.tma and not code.count("UTMALDG", loop=True), "no TMA in the hot loop"),
    ]
    narrow = [width for width, count in budget.loads.items() if code.loads(width) < count]
    found += [(True, f"too few loads of {width} bytes in the hot loop: {code.loop}") for width in narrow]
    return [message for holds, message in found if holds]


def wide_loads(threads: int, *tiles: int, widest: int = WIDEST) -> dict[int, int]:
    """The loads of a step that brings tiles of so many bytes: 16 bytes a thread, less only where a tile has less."""
    loads: dict[int, int] = {}
    for tile in tiles:
        width = min(widest, tile // threads)
        for at_most in (size for size in (2, 4, 8, 16) if size <= width):
            loads[at_most] = loads.get(at_most, 0) + tile // (threads * width)
    return loads


def shared_kib(ctas_per_sm: int, arch: int) -> float:
    """What each of ``ctas_per_sm`` CTAs may have of a multiprocessor, and any CTA at all."""
    return min(CTA_KIB[arch], SM_KIB[arch] / ctas_per_sm - 1)


def gemm_budget(gemm: Gemm | Fill, config: GemmConfig, arch: int) -> Budget:
    """From the row: registers and shared memory for ``ctas_per_sm``, and the bytes of a step. Fills read the L2."""
    bits = BITS.get(gemm.format, gemm.dtype.itemsize * 8)
    weights = config.block_n * config.block_k * bits // 8
    rows = config.block_t * config.block_k * gemm.dtype.itemsize
    halves = 2 if gemm.format is ExpertFormat.BF12 else 1  # of both tiles; each weight's exponent is with one of them
    loads = Counter(wide_loads(32 * config.num_warps, *[rows // halves] * halves))
    if not config.tma and not isinstance(gemm, Fill):
        tiles = [weights // 3] * 3 if halves == 2 else [weights]
        # Bytes that wgmma takes from registers pass through shared memory 8 at a time, and are loaded so.
        widest = 8 if halves == 2 and arch == 90 and gemm.dtype != torch.float32 else WIDEST
        loads.update(wide_loads(32 * config.num_warps, *tiles, widest=widest))
    return Budget(
        config.max_registers,
        shared_kib(config.ctas_per_sm, arch),
        None if gemm.dtype == torch.float32 else MULTIPLIES[arch],
        loads,
        config.tma,
    )


def gemv_budget(gemv: Gemv, arch: int) -> Budget:
    """The same from a row of the matrix-vector kernels."""
    config, size = gemv.config(arch), gemv.dtype.itemsize
    loads = wide_loads(32 * config.num_warps, config.block_n * config.block_k * size, config.block_k * size)
    return Budget(config.max_registers, shared_kib(config.ctas_per_sm, arch), loads=loads)


# The small kernels' budgets. Without a loop, or in one that the loads are not in, none are asked for.
SMALL_BUDGETS = {
    "plan_small_kernel": Budget(232, 8),  # one CTA on the whole GPU
    "count_kernel": Budget(32, 1),
    "scan_kernel": Budget(64, 1),
    "lists_kernel": Budget(64, 2),  # one CTA
    "scatter_kernel": Budget(128, 1),
    "_combine_kernel": Budget(48, 0),
    "_rms_norm_kernel": Budget(64, 0.5),  # 32 warps
    "_rope_write_kernel": Budget(32, 0),
    "_write_rows_kernel": Budget(32, 0),
    "_router_kernel": Budget(80, 0.25),
    "_chunks_kernel": Budget(168, 48, loads={16: 4}),  # three CTAs
    "_merge_kernel": Budget(64, 19, loads={16: 4}),
    "page_gather_kernel": Budget(64, 0, loads={16: 4}),  # four loads under way for each thread
    "_mla_chunks_kernel": Budget(128, 99, loads={16: 9}),  # two CTAs; one on the smallest architecture
}
# Their sizes lie between those of other launches of the same kernel: one architecture must do.
BETWEEN = {"route-8x8-of-128", "add-norm-bf16-4096", "router-qwen3", "attention-fp16-128"}
# Loads of 16 bytes in all of the code, where it is straight: for each of the operands at least one.
STRAIGHT_LOADS = {"_combine_kernel": 8, "_rms_norm_kernel": 1}


def gated(launch: Gemm | Fill, arch: int) -> bool:
    """Whether it is compiled for ``arch``. Weights that are decoded take long to compile: one architecture has all.

    A down projection has the row and the loop of an up projection, and does less with its sums; other dtypes than
    bfloat16 differ in the decoding. The other architectures leave out small groups of int4 too, which take fewer
    registers than 128, and MXFP4 without its clamp.
    """
    small = launch.format is ExpertFormat.INT4 and launch.group < 128
    unclamped = launch.format is ExpertFormat.MXFP4 and not launch.clamped
    decoded = launch.up and launch.dtype == torch.bfloat16 and not small and not unclamped
    return arch == 90 or launch.format is ExpertFormat.FLOAT or decoded


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for arch in ARCHES for name, gemm in GEMMS.items() if gated(gemm, arch)]
)
def test_gemms(compiler: Compiler, name: str, arch: int) -> None:
    gemm = GEMMS[name]
    config = gemm.config(arch)
    (code,) = compiler(name, arch)
    launched = [code.constants[constant] for constant in ("BN", "BT", "BK", "TMA", "num_warps", "num_stages")]
    row = [config.block_n, config.block_t, config.block_k, config.tma, config.num_warps, config.num_stages]
    assert launched == row, "the op did not choose the row of the table"
    assert faults(code, gemm_budget(gemm, config, arch)) == []


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", GEMVS)
def test_matrix_vector_kernels(compiler: Compiler, name: str, arch: int) -> None:
    (code,) = compiler(name, arch)
    assert faults(code, gemv_budget(GEMVS[name], arch)) == []


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for arch in ARCHES for name, fill in FILLS.items() if gated(fill, arch)]
)
def test_fills(compiler: Compiler, name: str, arch: int) -> None:
    fill = FILLS[name]
    (code,) = compiler(name, arch)
    assert faults(code, gemm_budget(fill, fill.config(arch), arch)) == []
    assert code.loads(WIDEST, loop=False) >= moe_fill.THREAD_BYTES // WIDEST, "the link is read by narrow loads"


@pytest.mark.parametrize("arch", [90])  # wgmma's
@pytest.mark.parametrize("name", [*GEMMS, *FILLS])
def test_no_register_is_written_while_it_is_read(compiler: Compiler, name: str, arch: int) -> None:
    (code,) = compiler(name, arch)
    assert code.overwritten == []


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for name in SMALL_KERNELS for arch in ([90] if name in BETWEEN else ARCHES)]
)
def test_small_kernels(compiler: Compiler, name: str, arch: int) -> None:
    codes = compiler(name, arch)
    assert codes
    for code in codes:
        budget = SMALL_BUDGETS[code.kernel]
        if "chunks" in code.kernel and "fp32" not in name:
            budget = replace(budget, tensor_cores="HMMA")  # 16 query heads are too few for wgmma
        assert faults(code, budget) == []
        assert code.loads(WIDEST, loop=False) >= STRAIGHT_LOADS.get(code.kernel, 0)


def test_a_spilling_kernel_is_found(compiler: Compiler) -> None:
    """The widest row with a tile that is too large for its warps, and the same row with few registers."""
    gemm = GEMMS["up-bf16-float-256"]
    budget = gemm_budget(gemm, gemm.config(80), 80)
    assert faults(compiler(str(gemm), 80)[0], budget) == []
    for name in SPILLING:
        (code,) = compiler(name, 80)
        assert any(fault.startswith("spills") for fault in faults(code, replace(budget, registers=255))), name


def test_a_kernel_without_tensor_cores_and_one_in_tf32_are_found(compiler: Compiler) -> None:
    (in_float32,), (in_half,) = compiler("up-fp32-float-64", 90), compiler("up-bf16-float-16", 90)
    gemm = GEMMS["up-bf16-float-16"]
    budget = gemm_budget(gemm, gemm.config(90), 90)
    assert "no HGMMA in the hot loop" in faults(in_float32, budget)
    assert "no TMA in the hot loop" in faults(in_float32, budget)
    assert any(fault.startswith("other tensor cores") for fault in faults(in_half, replace(budget, tensor_cores=None)))


def test_narrow_loads_and_small_budgets_are_found(compiler: Compiler) -> None:
    (code,) = compiler("unaligned", 90)
    gemm = GEMMS["down-bf16-float-64-pointers"]
    budget = gemm_budget(gemm, gemm.config(90), 90)
    assert any("too few loads of 16 bytes" in fault for fault in faults(code, budget))
    tight = faults(code, replace(budget, registers=32, shared_kib=16))
    assert any("registers, not 32" in fault for fault in tight) and any("not 16 KiB" in fault for fault in tight)


def test_registers_that_are_written_while_they_are_read_are_found(compiler: Compiler) -> None:
    """A compiler without this mistake leaves the kernels nothing to avoid."""
    (code,) = compiler("unwaited", 90)
    assert code.count("HGMMA", loop=True) and code.overwritten


def test_more_ctas_than_a_multiprocessor_takes_have_the_registers_of_those_it_takes(compiler: Compiler) -> None:
    assert [code.registers for arch in ARCHES for code in compiler("crowded", arch)] == [LEAST_REGISTERS] * 3


def test_no_length_of_a_work_list_compiles_a_kernel_of_its_own(compiler: Compiler) -> None:
    codes = compiler("lists", 90)
    assert len(codes) == 8 and len({code.hash for code in codes}) == 1


@pytest.mark.parametrize("arch", [90])
@pytest.mark.parametrize("name", ["sizes", "latent-sizes"])
def test_no_number_of_rows_nor_width_of_a_page_table_does(compiler: Compiler, name: str, arch: int) -> None:
    codes = compiler(name, arch)
    found = [(code.kernel, code.hash) for code in codes]
    assert len(found) >= 7 and len(set(found)) == len({code.kernel for code in codes})


def test_what_a_step_loads() -> None:
    assert wide_loads(128, 8192) == {2: 4, 4: 4, 8: 4, 16: 4}
    assert wide_loads(128, 1024, 4096) == {2: 3, 4: 3, 8: 3, 16: 2}
    assert wide_loads(128, 4096, widest=8) == {2: 4, 4: 4, 8: 4}
    assert shared_kib(2, 90) == 113 and shared_kib(1, 80) == 99
