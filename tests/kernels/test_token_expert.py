"""An expert of a few tokens, compiled: the numbers of its weights written out, whatever their format."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from duoserve.kernels.compiled.compiler import CpuCompiler
from duoserve.kernels.compiled.streamed import streamed_int4_product
from duoserve.kernels.compiled.token_expert import NO_CALLS, CallRows, SlotMatrix, SlotWeights, call_rows, token_expert
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import INT4_GROUPS, ExpertFormat, ExpertWeights, QuantizedLayout
from tests.helpers.compiled_case import few_streams, needs_compiler
from tests.kernels.quantized_case import fill_with_random_codes, written_out

# int4 and BF12, which take long to compile, have the sizes of models in tests/launching/: who comes later finds the
# code on the disk.
LAYOUTS = {
    "int8": QuantizedLayout(ExpertFormat.INT8, 36, 48),
    "int4": QuantizedLayout(ExpertFormat.INT4, 128, 256, 128, torch.float16),
    "fp8": QuantizedLayout(ExpertFormat.FP8, 256, 384),
    "bf12": QuantizedLayout(ExpertFormat.BF12, 32, 24),
    "ordered": QuantizedLayout(ExpertFormat.INT4, 256, 128, 128, torch.bfloat16, ordered=True),
}
ROWS = {"int8": (1, 2, 4), "int4": (1, 2), "fp8": (1, 2), "bf12": (1, 4), "ordered": (2,)}
CASES = [(name, rows) for name in LAYOUTS for rows in ROWS[name]]
SLOTS = 2


@needs_compiler
@pytest.mark.parametrize(("name", "num_rows"), CASES)
def test_a_compiled_expert_is_its_weights_written_out(
    name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "ordered":  # int4 but for a gather before its loops
        few_streams(monkeypatch)
    layout = LAYOUTS[name]
    weights = random_weights(layout)
    assert num_rows in call_rows(weights).sizes
    x_BH = torch.randn(16, layout.hidden, generator=torch.Generator().manual_seed(1))
    y_RH, slot = torch.empty(33, layout.hidden), SLOTS - 1  # not the slot that is recorded
    with torch.inference_mode():  # as models compile it, else the code on the disk is not found
        first, other = (SlotWeights.of(weights, each) for each in (0, slot))
        tokens_J, places_J = torch.tensor([[2, 0, 1, 2][:num_rows], [3, 1, 0, 4][:num_rows]]).unbind()
        recording = CpuCompiler(taped=True).record(partial(token_expert, x_BH, first, tokens_J, places_J, y_RH))
        in_slot = recording.on(dict(zip(first.tensors, other.tensors, strict=True)))
    expected_JH = expert(weights, slot, x_BH[tokens_J].double())
    others = [place for place in range(len(y_RH)) if place not in places_J]
    for _ in range(3):  # through PyTorch, writing down a tape, from the tape
        y_RH.fill_(torch.nan)
        in_slot.replay()
        torch.testing.assert_close(y_RH[places_J].double(), expected_JH, rtol=1e-5, atol=1e-6)
        assert y_RH[others].isnan().all()


@pytest.mark.parametrize("group", INT4_GROUPS)
@pytest.mark.parametrize("hidden", [128, 384])
def test_an_int4_product_of_one_row_takes_every_code(group: int, hidden: int) -> None:
    weights = random_weights(QuantizedLayout(ExpertFormat.INT4, hidden, 128, group, torch.bfloat16))
    matrix, x_K = SlotMatrix.of(weights.w13, 0), torch.randn(hidden, generator=torch.Generator().manual_seed(1))
    assert matrix.scales is not None
    assert matrix.zeros is not None
    y_N = streamed_int4_product(matrix.data, matrix.scales, matrix.zeros, x_K)
    w_NK = written_out(weights.w13, 0)
    assert w_NK.unique().numel() > len(w_NK)  # codes, zero-points and scales differ
    torch.testing.assert_close(y_N.double(), w_NK @ x_K.double(), rtol=1e-5, atol=1e-6)


def test_fp8_is_loops_where_blocks_are_whole() -> None:
    rows = [call_rows(random_weights(QuantizedLayout(ExpertFormat.FP8, *sizes))) for sizes in ((128, 256), (128, 200))]
    assert rows == [CallRows((1, 2), 4), NO_CALLS]


def test_half_bytes_are_loops_where_a_group_fills_a_vector() -> None:
    rows = {
        group: call_rows(random_weights(QuantizedLayout(ExpertFormat.INT4, 128, 128, group))) for group in INT4_GROUPS
    }
    assert rows == {32: NO_CALLS, 64: NO_CALLS, 128: CallRows((1, 2), 16)}


def test_rows_go_into_the_least_call_that_takes_them_all_or_into_several() -> None:
    rows = CallRows((1, 2, 4), 8)
    assert [rows.next_call(num_rows) for num_rows in range(1, 9)] == [1, 2, 4, 4, 4, 4, 4, 4]


def random_weights(layout: QuantizedLayout) -> ExpertWeights:
    """Of SLOTS slots; an order, where there is one, is a random one."""
    weights = layout.weights(torch.zeros(SLOTS, layout.slot_bytes, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(0)
    for slot in range(SLOTS):
        for matrix in (weights.w13, weights.w2):
            fill_with_random_codes(matrix, slot, generator)
        if weights.order_SH is not None:
            weights.order_SH[slot] = torch.randperm(layout.hidden, generator=generator)
    return weights


def expert(weights: ExpertWeights, slot: int, x_JH: Tensor) -> Tensor:
    """In the dtype of ``x_JH``."""
    w13_NH, w2_HI = (dense(matrix, slot).to(x_JH.dtype) for matrix in (weights.w13, weights.w2))
    product_JN = x_JH @ w13_NH.T
    return (F.silu(product_JN[:, 0::2]) * product_JN[:, 1::2]) @ w2_HI.T
