"""BF12 in Triton: what a byte and its exponent are, where a row's parts lie, and the escapes by themselves."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from duoserve.errors import KernelError
from duoserve.kernels import bf12, moe_gemm
from duoserve.kernels.configs import HUGE, INTERPRETER, LARGE, MEDIUM, SMALL, gemm_config
from duoserve.kernels.dequant import FOUR_BY_HIGH_HALVES, FOUR_BY_LOW_HALVES, bf12_unit, decode_bf12
from duoserve.kernels.moe_bf12 import bytes_of_row, places_of
from duoserve.kernels.numerics import TRITON_DTYPES, interpreting
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat, Matrix
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits
from tests.kernels.experts_case import Case, layer, make_case

BF12 = (ExpertFormat.BF12, 0)


@triton.jit
def decode_kernel(out, HIGH: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    byte, code = tl.arange(0, 256)[:, None], tl.arange(0, 256)[None, :]
    both = tl.zeros((256, 256), tl.int32)
    value = decode_bf12((both + byte).to(tl.uint8), (both + code).to(tl.uint8), HIGH, DTYPE, INTERPRET)
    tl.store(out + byte * 256 + code, value.to(tl.float32) * bf12_unit(DTYPE))


def every_weight(high: bool) -> torch.Tensor:
    """float32 [256, 256] of sign and mantissa, and of the byte that has the exponent in one half."""
    signed, code = torch.arange(256).to(torch.uint8).view(torch.int8).int(), torch.arange(256)
    return (bf12.signed(signed)[:, None] << (code >> 4 if high else code & 15)).float()


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_and_exponent(dtype: torch.dtype, high: bool) -> None:
    out = torch.empty(256, 256, device=DEVICE)
    decode_kernel[(1,)](out, high, TRITON_DTYPES[dtype], interpreting())
    assert torch.equal(out.cpu(), every_weight(high))


def permuted(first: np.ndarray, second: int, selector: int) -> np.ndarray:
    """PTX's prmt: each byte of the result is one of the operands', or its sign eight times."""
    assert second == 0
    result = np.zeros_like(first)
    for place in range(4):
        chosen = selector >> 4 * place & 15
        byte = first >> 8 * (chosen & 3) & 255 if chosen & 4 == 0 else np.zeros_like(first)
        result |= (byte >> 7) * 255 << 8 * place if chosen & 8 else byte << 8 * place
    return result


PTX = {"prmt": permuted, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift}


@pytest.mark.parametrize(("assembly", "high"), [(FOUR_BY_LOW_HALVES, False), (FOUR_BY_HIGH_HALVES, True)])
def test_the_assembly_gives_every_weight_in_every_place(assembly: tl.constexpr, high: bool) -> None:
    """The interpreter knows none, so its text is followed here."""
    truth = every_weight(high).numpy().ravel()
    bytes_, codes = (grid.ravel() for grid in np.indices((256, 256)))
    for place in range(4):
        # The other three of a register are other weights.
        around = [np.roll(np.arange(65536), 257 * (other - place)) for other in range(4)]
        registers = {
            f"${number}": sum((part[order].astype(np.int64) << 8 * at for at, order in enumerate(around)), start=0)
            for number, part in ((2, bytes_), (3, codes))
        }
        for name, target, operands in re.findall(r"(\w+)\.b32 (\S+), ([^;]*);", assembly.value):
            values = [registers[part] if part in registers else int(part, 0) for part in operands.split(", ")]
            registers[target] = PTX[name](*values) & 0xFFFFFFFF
        halves = registers[f"${place // 2}"] >> 16 * (place % 2) & 0xFFFF
        floats = (halves.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(floats * 64, truth)


@triton.jit
def row_kernel(out, D):
    tl.store(out, places_of(D))
    tl.store(out + 1, bytes_of_row(D))


@pytest.mark.parametrize("inner", [4, 12, 768, 1020, 1024, 1028, 2048, 2880, 4096, 14336, 32768])
def test_rows_are_as_the_format_says(inner: int) -> None:
    out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    row_kernel[(1,)](out, inner)
    assert out.tolist() == [bf12.room(inner), bf12.row_bytes(inner)]


def use_places(matrix: Matrix, slot: int, count: int) -> None:
    """Of each row the first ``count`` places, with weights far from each other; all other weights as they are."""
    rows = bf12.Bf12Rows.of(matrix.data_SNB[slot], matrix.scales_SGN[slot, 0], matrix.inner)
    least_N1 = bf12.LEAST * rows.scales_N[:, None]
    rows.columns_NC.zero_()
    rows.escapes_NC.copy_(least_N1.expand_as(rows.escapes_NC))
    for place in range(count):
        column = matrix.inner - 1 - 3 * place
        rows.columns_NC[:, place] = column
        rows.escapes_NC[:, place] = (-1.0) ** place * 10.0 ** -(place * 3) * 0.7
        rows.signed_ND[:, column] = 0
        half = matrix.inner // 2
        rows.exponents_NB[:, column % half] &= 0xF0 if column < half else 0x0F


def rows_of(matrix: Matrix, first: int, last: int | None = None) -> Matrix:
    data_SNB, scales_SGN = matrix.data_SNB[:, first:last], matrix.scales_SGN[:, :, first:last]
    return matrix._replace(data_SNB=data_SNB, scales_SGN=scales_SGN)


def with_places(count: int, dtype: torch.dtype, inner: int = 32) -> Case:
    case = make_case(20, 2, 2, 48, inner, dtype, BF12, away=0.0)
    for slot in case.slots_E.tolist():
        use_places(case.pool.weights.w13, slot, count)
        use_places(case.pool.weights.w2, slot, count)
    case.pool.keep()
    return remade(case)


def remade(case: Case) -> Case:
    """With the weights that the pool now has."""
    slots, both = case.slots_E.tolist(), (case.pool.weights.w13, case.pool.weights.w2)
    w13_ENH, w2_EHI = (torch.stack([dense(matrix, slot) for slot in slots]) for matrix in both)
    return replace(case, w13_ENH=w13_ENH, w2_EHI=w2_EHI)


@pytest.mark.parametrize("block_t", [SMALL, MEDIUM])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_use_some_of_their_places(dtype: torch.dtype, count: int, block_t: int) -> None:
    """None, one and all; rows of x in one piece and in several."""
    case = with_places(count, dtype)
    act, y = layer(case, gemm_config(dtype, INTERPRETER, block_t, True, *BF12))
    assert_close(act[: len(case.computed)], case.true_act(), dtype)
    assert_close(y[case.computed], case.true_y(act), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_place_that_is_not_used_reads_nothing(dtype: torch.dtype) -> None:
    """Its column is 0, where x is infinite here; an infinity times nothing would be no number."""
    case = with_places(0, dtype)
    w2, act = case.pool.weights.w2, torch.randn(40, 32).to(DEVICE, dtype)
    for slot in case.slots_E.tolist():
        w2.scales_SGN[slot].clamp_(min=2.0**-30)
        for first, count in ((0, 4), (2, 1), (3, 0)):  # others of the tile use them
            use_places(rows_of(w2, first), slot, count)
    case.pool.keep()
    act[:, 0] = float("inf")
    y = case.y()
    moe_gemm.moe_down(act, case.pool.weights, case.plan, case.all_work, y)
    column_EH = remade(case).w2_EHI[:, :, 0].double()
    experts = case.ids_TK.flatten()[case.computed].long()
    assert torch.equal(y[case.computed].double(), column_EH[experts] * float("inf"))


@pytest.mark.parametrize("block_t", [SMALL, MEDIUM])
def test_rows_have_the_same_bits_beside_rows_with_escapes(block_t: int) -> None:
    """Also the sign of a zero, in rows without scale."""
    case, results = with_places(0, torch.float32), []
    w2, act = case.pool.weights.w2, torch.randn(40, 32).to(DEVICE)
    config = gemm_config(torch.float32, INTERPRETER, block_t, True, *BF12)
    for count in (0, 4):
        for slot in case.slots_E.tolist():
            use_places(rows_of(w2, 0, 2), slot, count)
        results.append(case.y())
        moe_gemm.moe_down(act, case.pool.weights, case.plan, case.all_work, results[-1], config)
    assert_same_bits(results[1][:, 2:], results[0][:, 2:])
    assert not torch.equal(results[1][:, :2], results[0][:, :2])
    assert bool((results[0][:, 2:] == 0).any())


@pytest.mark.parametrize("arch", [INTERPRETER, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_order_of_columns_whatever_the_batch(dtype: torch.dtype, arch: int) -> None:
    """A step takes from both halves of a row, so a row's bits depend on how wide it is."""
    rows = [gemm_config(dtype, arch, block_t, True, *BF12) for block_t in (SMALL, MEDIUM, LARGE, HUGE)]
    assert len({row.block_k for row in rows}) == 1 and not any(row.tma for row in rows)


def test_no_descriptor_reads_it() -> None:
    case = with_places(0, torch.float16)
    config = replace(gemm_config(torch.float16, INTERPRETER, SMALL, True, *BF12), tma=True)
    with pytest.raises(KernelError, match="bf12 is read through pointers"):
        moe_gemm.moe_up(case.x_TH, case.pool.weights, case.plan, case.all_work, case.act(), config=config)


@pytest.mark.parametrize("column", [48, 32767, -1, -32768])
def test_columns_that_no_row_has_are_not_read(column: int) -> None:
    """Bytes of a damaged pack must not make a GPU read where nothing may be read."""
    plain = with_places(1, torch.float32)
    damaged = with_places(2, torch.float32)
    for case in (plain, damaged):
        for slot in case.slots_E.tolist():
            for matrix in (case.pool.weights.w13, case.pool.weights.w2):
                rows = bf12.Bf12Rows.of(matrix.data_SNB[slot], matrix.scales_SGN[slot, 0], matrix.inner)
                rows.signed_ND[:, [matrix.inner - 1, matrix.inner - 4]] = 0
                rows.exponents_NB.zero_()
                if case is damaged:
                    rows.columns_NC[:, 1] = column
    for ours, theirs in zip(layer(damaged), layer(plain), strict=True):
        assert_same_bits(ours, theirs)
