"""Quantized experts: decoding by specification, exactly, and the GEMMs on decoded weights against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from duoserve.errors import KernelError
from duoserve.kernels import Work, dequant, moe_gemm, moe_gemv, reference
from duoserve.kernels.configs import INTERPRETER, SMALL, gemm_config
from duoserve.kernels.numerics import interpreting
from duoserve.kernels.reference_dequant import E2M1, dense
from duoserve.kernels.weights import ExpertFormat, QuantizedLayout
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits, poisoned
from tests.kernels.quantized_case import LAYOUTS, QuantizedCase, minifloat, written_out

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
    case = QuantizedCase(QuantizedLayout(form, 128, inter, group), 2, 1, 1, torch.float32)
    slot = int(case.slots_E[0])
    for matrix in (case.on_host.w13, case.on_host.w2):
        assert torch.equal(dense(matrix, slot), written_out(matrix, slot).float())


# Odd sizes, several groups and blocks (fp8: more than 128 gate rows), several tiles of rows, every format and dtype.
GEMMS = (
    (ExpertFormat.INT8, 0, torch.bfloat16, 5, 144, 11, False),
    (ExpertFormat.INT8, 0, torch.float32, 1, 40, 96, False),
    (ExpertFormat.INT4, 32, torch.float16, 19, 64, 32, False),
    (ExpertFormat.INT4, 64, torch.bfloat16, 5, 64, 128, False),
    (ExpertFormat.INT4, 128, torch.float32, 1, 128, 128, False),
    (ExpertFormat.INT4, 32, torch.float16, 5, 96, 64, True),
    (ExpertFormat.FP8, 0, torch.bfloat16, 5, 40, 144, False),
    (ExpertFormat.FP8, 0, torch.float16, 1, 144, 11, False),
    (ExpertFormat.FP8, 0, torch.float16, 2, 144, 32, True),
    (ExpertFormat.MXFP4, 0, torch.bfloat16, 5, 64, 96, False),
    (ExpertFormat.MXFP4, 0, torch.float16, 19, 32, 64, True),
)


@pytest.mark.parametrize(("form", "group", "dtype", "tokens", "hidden", "inter", "tma"), GEMMS)
def test_gemms_on_quantized_weights(
    form: ExpertFormat, group: int, dtype: torch.dtype, tokens: int, hidden: int, inter: int, tma: bool
) -> None:
    """Also in two launches, through descriptors, and the twins."""
    case = QuantizedCase(QuantizedLayout(form, hidden, inter, group), tokens, 2, 3, dtype)
    config = replace(gemm_config(dtype, INTERPRETER, SMALL, True, form, group), tma=tma)
    num_rows, plan, weights = tokens * 2, case.plan, case.weights
    arrived = Work.of([(e, int(case.slots_E[e])) for e, _ in plan.missing.pairs()], DEVICE)
    everything = Work.of([*plan.resident.pairs(), *arrived.pairs()], DEVICE)
    up = case.truth(case.x_TH[plan.order_N.long() // 2], case.by_expert(case.on_host.w13))
    true_act = torch.nn.functional.silu(up[:, 0::2]) * up[:, 1::2]

    acts, ys = [], []
    for works in ([everything], [plan.resident, arrived]):
        act, y = poisoned(num_rows, inter, dtype=dtype), poisoned(num_rows, hidden, dtype=dtype)
        for work in works:
            moe_gemm.moe_up(case.x_TH, weights, plan, work, act, config)
            moe_gemm.moe_down(act, weights, plan, work, y, config)
        acts.append(act)
        ys.append(y)
    assert_close(acts[0], true_act, dtype)
    true_y = case.truth(acts[0], case.by_expert(case.on_host.w2))
    assert_close(ys[0][plan.order_N.long()], true_y, dtype)
    assert_same_bits(acts[1], acts[0])
    assert_same_bits(ys[1], ys[0])
    assert case.untouched()

    twin_act, twin_y = poisoned(num_rows, inter, dtype=dtype), poisoned(num_rows, hidden, dtype=dtype)
    reference.moe_up(case.x_TH, weights, plan, everything, twin_act)
    reference.moe_down(acts[0], weights, plan, everything, twin_y)
    assert_close(twin_act, true_act, dtype, roundings=2)
    assert_close(twin_y[plan.order_N.long()], true_y, dtype)


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
    case = QuantizedCase(QuantizedLayout(ExpertFormat.INT4, 64, 64, 32), 2, 1, 2, torch.float16)
    act, weights = poisoned(2, 64, dtype=torch.float16), case.weights
    for message, broken in {
        "no scales": replace(weights, s13=None),
        "int4 alone": replace(weights, z13=None),
        "scales of w2_SHI is torch.uint8": replace(weights, s2=weights.z2),
        "groups of 16": replace(weights, group=16),
        "w13_SNH is torch.int8": replace(
            weights, w13_SNH=weights.w13_SNH.view(torch.int8), w2_SHI=weights.w2_SHI.view(torch.int8)
        ),
    }.items():
        with pytest.raises(KernelError, match=message):
            moe_gemm.moe_up(case.x_TH, broken, case.plan, case.plan.resident, act)
    with pytest.raises(KernelError, match="computed by moe_up"):
        moe_gemv.moe_gemv_up(case.x_TH[:1], weights, case.slots_E.to(DEVICE), act)
