"""BF12 and int4 unpacked by compiled loops: the bits of the twin, in pieces and in what is left over."""

from __future__ import annotations

import pytest
import torch

from duoserve import CompilerError
from duoserve.kernels.compiled import unpacking
from duoserve.kernels.compiled.loops import CompiledLoops
from duoserve.kernels.compiled.unpacking import with_compiled_unpacking
from duoserve.kernels.reference_codes import code_product
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat, ExpertWeights, Matrix, QuantizedLayout
from tests.helpers.compiled_case import needs_compiler
from tests.kernels.common import assert_close
from tests.kernels.quantized_case import fill_with_random_codes

HIDDEN, INTER = 48, 36


def random_weights() -> ExpertWeights:
    layout = QuantizedLayout(ExpertFormat.BF12, HIDDEN, INTER)
    weights = layout.weights(torch.zeros(2, layout.slot_bytes, dtype=torch.uint8))
    for slot in range(2):
        for matrix in (weights.w13, weights.w2):
            fill_with_random_codes(matrix, slot, torch.Generator().manual_seed(slot))
    return weights


@needs_compiler
@pytest.mark.parametrize("piece_rows", [1, 16, 64, 1024])
def test_pieces_and_what_is_left_over_have_the_bits_of_the_twin(
    piece_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 72 and of 48 rows: none, some or all are in pieces."""
    monkeypatch.setattr(unpacking, "PIECE_WEIGHTS", piece_rows * HIDDEN)
    plain = random_weights()
    compiled = with_compiled_unpacking(plain)
    for slot in (0, 1, 0):
        for matrix, twin in ((compiled.w13, plain.w13), (compiled.w2, plain.w2)):
            for rows in (slice(None), slice(5, 38)):
                unpacked_ND, truth_ND = dense(matrix, slot, rows), dense(twin, slot, rows)
                assert torch.equal(unpacked_ND.view(torch.int16), truth_ND.view(torch.int16))


def test_loops_that_cannot_be_compiled_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the disk has become full since the compiler was tried."""

    def fail(*_: object) -> None:
        raise CompilerError("No space left on device")

    monkeypatch.setattr(CompiledLoops, "prepare", fail)
    weights = random_weights()
    with pytest.warns(UserWarning, match="BF12 is unpacked op by op, more slowly: .*No space left on device"):
        assert with_compiled_unpacking(weights) is weights


@needs_compiler
def test_codes_by_words_are_those_by_bytes_in_another_order() -> None:
    """For any rows of a slot, each group's features first to last; a group of 128 is the least of ``w2``."""
    layout = QuantizedLayout(ExpertFormat.INT4, 256, 128, group=128)
    plain = layout.weights(torch.zeros(2, layout.slot_bytes, dtype=torch.uint8))
    for slot, matrix in ((0, plain.w13), (1, plain.w13), (1, plain.w2)):
        fill_with_random_codes(matrix, slot, torch.Generator().manual_seed(slot))
    compiled = with_compiled_unpacking(plain)
    for slot, matrix, twin in ((0, compiled.w13, plain.w13), (1, compiled.w13, plain.w13), (1, compiled.w2, plain.w2)):
        for rows in (slice(None), slice(5, 38), slice(7, 8)):
            found, truth = (unpacked(one, slot, rows) for one in (matrix, twin))
            assert found.shape[2] == 8 and truth.shape[2] == 2
            assert torch.equal(in_order(found), in_order(truth))


def unpacked(matrix: Matrix, slot: int, rows: slice) -> torch.Tensor:
    return matrix.int4_codes(*matrix.words_and_zeros(slot, rows))


def in_order(codes_GNPC: torch.Tensor) -> torch.Tensor:
    return codes_GNPC.permute(1, 0, 3, 2).flatten(1)


@needs_compiler
def test_a_product_by_compiled_codes_is_the_twins_but_for_rounding() -> None:
    layout = QuantizedLayout(ExpertFormat.INT4, 256, 128, group=128)
    plain = layout.weights(torch.zeros(1, layout.slot_bytes, dtype=torch.uint8))
    fill_with_random_codes(plain.w13, 0, torch.Generator().manual_seed(3))
    x_JD = torch.randn(9, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    compiled = with_compiled_unpacking(plain)
    truth_JN = x_JD.double() @ dense(plain.w13, 0).double().T
    for matrix in (plain.w13, compiled.w13):
        assert_close(code_product(x_JD, matrix, 0, slice(None)), truth_JN, torch.bfloat16)


def test_other_formats_stay_as_they_are() -> None:
    layout = QuantizedLayout(ExpertFormat.INT8, HIDDEN, INTER)
    weights = layout.weights(torch.zeros(1, layout.slot_bytes, dtype=torch.uint8))
    assert with_compiled_unpacking(weights) is weights
