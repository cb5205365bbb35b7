"""Products on a CPU by their routes: each equals float64 math, whatever the machine would choose."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from duoserve.experts.layout import ExpertLayout, Quantized
from duoserve.kernels import matmul
from duoserve.kernels.matmul import LEFT_ROWS, Products, has_native_matmul, left_product, linear, product_of_blocks
from duoserve.kernels.reference_codes import PACKED_ROWS, code_product, multiplies_codes
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat, Matrix
from tests.kernels.common import assert_close
from tests.kernels.quantized_case import fill_with_random_codes

BF16 = torch.bfloat16
INT4 = Quantized(ExpertFormat.INT4, 32)
INT8 = Quantized(ExpertFormat.INT8)
FP8 = Quantized(ExpertFormat.FP8)
MXFP4 = Quantized(ExpertFormat.MXFP4)


@pytest.mark.parametrize(
    ("capabilities", "dtypes"),
    [
        ({"avx2": True, "avx512_bf16": False}, []),
        ({"amx_bf16": True, "avx512_fp16": True}, [BF16, torch.float16]),
        ({"neon": True, "bf16": True, "fp16_arith": True}, [BF16]),  # Neoverse V1, as of a Graviton3
        ({"neon": True, "bf16": False}, []),  # Neoverse N1
    ],
)
def test_what_a_cpu_multiplies_itself(
    capabilities: dict[str, bool], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    halves = (BF16, torch.float16)
    assert [dtype for dtype in halves if has_native_matmul.__wrapped__(dtype)] == dtypes


@pytest.mark.parametrize("rows", [1, 2, LEFT_ROWS, LEFT_ROWS + 1])
@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_may_come_in_blocks_of_rows(rows: int, turned: bool) -> None:
    """Each is gone when the next is asked for; the last is shorter."""
    x_TK, w_NK = torch.randn(rows, 75).to(BF16), torch.randn(41, 75).to(BF16)
    buffer_BK = torch.empty(16, 75, dtype=BF16)
    blocks = (buffer_BK[: len(part)].copy_(part) for part in w_NK.split(16))
    y_TN = product_of_blocks(x_TK, blocks, 41, turned)
    assert y_TN.dtype is BF16 and (turned or y_TN.is_contiguous())
    assert_close(y_TN, x_TK.double() @ w_NK.double().T, BF16)


@pytest.mark.parametrize("rows", [1, 2, LEFT_ROWS, LEFT_ROWS + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_weights_on_the_left(rows: int, biased: bool) -> None:
    x_TK, w_NK = torch.randn(rows, 75).to(BF16), torch.randn(41, 75).to(BF16)
    bias_N = torch.randn(41).to(BF16) if biased else None
    truth_TN = x_TK.double() @ w_NK.double().T + (0 if bias_N is None else bias_N.double())
    assert_close(left_product(x_TK, w_NK, bias_N), truth_TN, BF16)
    product_TN = linear(x_TK, w_NK, bias_N)
    assert_close(product_TN, truth_TN, BF16)
    assert product_TN.is_contiguous()


def made(stored: Quantized, hidden: int, inter: int) -> Matrix:
    """The up projection of random experts in three slots."""
    layout = ExpertLayout(stored, hidden, inter)
    matrix = layout.weights(torch.empty(3, layout.slot_bytes, dtype=torch.uint8)).w13
    for slot in range(3):
        fill_with_random_codes(matrix, slot, torch.Generator().manual_seed(slot))
    return matrix


def truth(x_JD: Tensor, matrix: Matrix, rows: slice) -> Tensor:
    return x_JD.double() @ dense(matrix, 1, rows).double().T


@pytest.mark.parametrize("rows", [1, 3, PACKED_ROWS, PACKED_ROWS + 1, 40, 2100])
@pytest.mark.parametrize(
    ("stored", "hidden"), [(INT8, 96), (INT8, 41), (INT8, 72), (INT4, 96), (INT4, 32), (FP8, 384), (MXFP4, 96)]
)
def test_codes_mean_what_decoded_weights_mean(stored: Quantized, hidden: int, rows: int) -> None:
    """Rows that are whole vectors, and those that are not; positive inputs, so that zero-points have to cancel."""
    matrix, x_JD = made(stored, hidden, 160), torch.rand(rows, hidden).to(BF16)
    assert multiplies_codes(matrix, BF16)
    for block in (slice(0, 320), slice(10, 31), slice(250, 320)):
        assert_close(code_product(x_JD, matrix, 1, block), truth(x_JD, matrix, block), BF16)


def test_a_weight_that_is_no_number_is_none_in_a_product() -> None:
    fp8, mxfp4 = made(FP8, 128, 32), made(MXFP4, 64, 32)
    assert mxfp4.scales_SGN is not None
    fp8.data_SNB[1, 5, 7], mxfp4.scales_SGN[1, 1, 5] = 0x7F, 255
    for matrix in (fp8, mxfp4):
        y_N = code_product(torch.ones(1, matrix.inner, dtype=BF16), matrix, 1, slice(0, 64))[0]
        assert y_N.isnan().nonzero().flatten().tolist() == [5]


def test_what_codes_cannot_do_is_decoded() -> None:
    assert not multiplies_codes(made(INT8, 32, 32), torch.float16)
    assert not multiplies_codes(made(INT4, 32, 32), torch.float32)
    assert not multiplies_codes(made(FP8, 200, 128), BF16)


def test_a_tracer_sees_one_call_however_many_blocks_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_native_matmul", lambda dtype: False)
    x_TK, nodes = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    for num_blocks in (2, 8):
        w_NK = torch.randn(8 * num_blocks, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        monkeypatch.setattr(matmul, "WIDEN_ELEMENTS", w_NK.numel() // num_blocks)
        traced = make_fx(partial(matmul.linear, bias_N=None, products=Products.FASTEST))(x_TK, w_NK)
        nodes.append(len(traced.graph.nodes))
        expected_TN = (x_TK.double() @ w_NK.double().T).bfloat16()
        torch.testing.assert_close(traced(x_TK, w_NK), expected_TN)
    assert nodes[0] == nodes[1]
