"""Quantized experts: decoding by specification, exactly, and where the bytes lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from duoserve.errors import KernelError
from duoserve.kernels import dequant, moe_gemm, moe_gemv
from duoserve.kernels.numerics import interpreting
from duoserve.kernels.reference_dequant import E2M1, dense
from duoserve.kernels.weights import ExpertFormat, QuantizedLayout
from tests.kernels.common import DEVICE, DTYPES, poisoned
from tests.kernels.experts_case import make_case
from tests.kernels.quantized_case import LAYOUTS, minifloat, written_out

TRITON_HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def decode_bytes_kernel(codes, zeros, out, KIND: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    i = tl.arange(0, 256)
    tile = tl.load(codes + i)[None, :]
    if KIND == "fp8":
        value = dequant.decode_fp8(tile, DTYPE, False, INTERPRET)
    elif KIND == "mxfp4":
        value = dequant.decode_e2m1(tile, DTYPE, INTERPRET)
    elif KIND == "e8m0":
        value = dequant.e8m0(tile)
    else:
        value = dequant.decode_int4(tile, tl.load(zeros + tl.arange(0, 1)), DTYPE, INTERPRET)
    tl.store(out + i[None, :], value.to(tl.float32))


def decoded(kind: str, codes: torch.Tensor, dtype: torch.dtype, zero: int = 0) -> torch.Tensor:
    out = poisoned(256, dtype=torch.float32)
    zeros = torch.tensor([zero], dtype=torch.uint8, device=DEVICE)
    decode_bytes_kernel[(1,)](codes.to(DEVICE), zeros, out, kind, TRITON_HALVES[dtype], interpreting())
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_decodes_to_its_value(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    fp8 = torch.tensor([float("nan") if code & 127 == 127 else minifloat(code, 4, 3, 7) for code in range(256)])
    torch.testing.assert_close(decoded("fp8", codes, dtype), fp8, rtol=0, atol=0, equal_nan=True)
    e2m1 = torch.tensor([minifloat(code & 15, 2, 1, 1) for code in range(256)])
    assert torch.equal(decoded("mxfp4", codes & 15, dtype), e2m1)
    assert [minifloat(code, 2, 1, 1) for code in range(16)] == list(E2M1)
    for zero in (0, 1, 8, 15, 16):
        assert decoded("int4", codes & 15, dtype, zero).tolist() == [(code & 15) - zero for code in range(256)]


def test_every_scale_of_mxfp4() -> None:
    codes = torch.arange(256).to(torch.uint8)
    truth = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")], dtype=torch.float64).float()
    torch.testing.assert_close(decoded("e8m0", codes, torch.float32), truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("form", "group"), LAYOUTS)
def test_the_twin_decodes_by_specification(form: ExpertFormat, group: int) -> None:
    inter = 160 if form in (ExpertFormat.INT8, ExpertFormat.FP8) else 128
    case = make_case(1, 1, 1, 128, inter, torch.float32, (form, group))
    slot = int(case.slots_E[0])
    for matrix in (case.pool.weights.w13, case.pool.weights.w2):
        assert torch.equal(dense(matrix, slot).cpu().float(), written_out(matrix, slot).float())


@pytest.mark.parametrize(("form", "group"), LAYOUTS)
def test_segments_lie_apart_and_on_their_boundaries(form: ExpertFormat, group: int) -> None:
    layout = QuantizedLayout(form, 256, 128, group)
    rows = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)
    weights = layout.weights(rows)
    assert layout.slot_bytes % 256 == 0
    parts = [
        p for p in (weights.w13_SNH, weights.s13, weights.z13, weights.w2_SHI, weights.s2, weights.z2) if p is not None
    ]
    for part in parts:
        assert not bool(part.view(torch.uint8).any()), "overlaps another segment"
        part.view(torch.uint8).fill_(1)
    for part in (weights.w13_SNH, weights.s13, weights.w2_SHI, weights.s2):
        assert (part.data_ptr() - rows.data_ptr()) % 256 == 0


def test_what_a_format_cannot_be_is_refused() -> None:
    for message, arguments in {
        "groups of 48": (ExpertFormat.INT4, 96, 96, 48),
        "hidden is 96; int4 takes multiples of 64": (ExpertFormat.INT4, 96, 128, 64),
        "intermediate is 11; mxfp4": (ExpertFormat.MXFP4, 64, 11),
        "FLOAT": (ExpertFormat.FLOAT, 64, 64),
    }.items():
        with pytest.raises(KernelError, match=message):
            QuantizedLayout(*arguments)
    case = make_case(2, 1, 2, 64, 64, torch.float16, (ExpertFormat.INT4, 32))
    act, weights = case.act(), case.pool.weights
    for message, broken in {
        "no scales": replace(weights, s13=None),
        "int4 alone": replace(weights, z13=None),
        "scales of w2_SHI is torch.uint8": replace(weights, s2=weights.z2),
        "groups of 16": replace(weights, group=16),
        "an order of their own have no kernel": replace(weights, order_SH=case.slots_E[:, None].expand(-1, 64)),
        "w13_SNH is torch.int8": replace(
            weights, w13_SNH=weights.w13_SNH.view(torch.int8), w2_SHI=weights.w2_SHI.view(torch.int8)
        ),
    }.items():
        with pytest.raises(KernelError, match=message):
            moe_gemm.moe_up(case.x_TH, broken, case.plan, case.plan.resident, act)
    with pytest.raises(KernelError, match="computed by moe_up"):
        moe_gemv.moe_gemv_up(case.x_TH[:1], weights, case.slots_E.to(DEVICE), act)
