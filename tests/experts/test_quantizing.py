"""Experts made int8 and int4: what the codes leave of the weights, and that no other choice of scale leaves more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, BrokenBarrierError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.errors import CopyError
from duoserve.experts.formats.codes import Codes, RowsAsTheyAre
from duoserve.experts.layout import ExpertId, ExpertLayout, Quantized
from duoserve.experts.pieces import RowPart, float_parts
from duoserve.experts.quantizing import QuantizingStore
from duoserve.experts.rows import aligned_rows
from duoserve.experts.scale_search import INT4_SPANS, INT8_SPANS, OP_BY_OP, ScaleSearch, Way
from duoserve.kernels.compiled.loops import CompiledLoops
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat, Matrix
from tests.experts.formats.tensor_rows import TensorRows
from tests.helpers.compiled_case import needs_compiler
from tests.helpers.fakes import ArrayStore

INT8, INT4 = Quantized(ExpertFormat.INT8), Quantized(ExpertFormat.INT4, 32)
INT4_128 = Quantized(ExpertFormat.INT4, 128)
KINDS = [INT8, INT4, Quantized(ExpertFormat.INT4, 64), INT4_128]
COMPILED = Way(CompiledLoops(), 128 * 128)  # what is compiled serves all tests
WAYS = [
    *(pytest.param(kind, OP_BY_OP, id=str(kind)) for kind in KINDS),
    *(pytest.param(kind, COMPILED, id=f"{kind}-compiled", marks=needs_compiler) for kind in (INT8, INT4_128)),
]


def quantized(w_ND: Tensor, stored: Quantized, way: Way = OP_BY_OP) -> Codes:
    num_rows, inner = w_ND.shape
    group, is_int4 = stored.group or inner, stored.format is ExpertFormat.INT4
    matrix = Matrix(
        torch.empty(1, num_rows, inner // 2 if is_int4 else inner, dtype=torch.uint8 if is_int4 else torch.int8),
        torch.empty(1, inner // group, num_rows, dtype=stored.scale_dtype if is_int4 else torch.float32),
        torch.empty(1, inner // group, num_rows, dtype=torch.uint8) if is_int4 else None,
        inner,
        stored.format,
        group,
        interleaved=False,
    )
    ScaleSearch(stored, way).fill(matrix, slice(0, num_rows), w_ND)
    assert matrix.scales_SGN is not None
    zeros_GN = None if matrix.zeros_SGN is None else matrix.zeros_SGN[0]
    return Codes(stored.format, group, RowsAsTheyAre(TensorRows(matrix.data_SNB[0])), matrix.scales_SGN[0], zeros_GN)


def decoded(codes: Codes) -> Tensor:
    return codes.dense() if codes.format is ExpertFormat.INT4 else codes.data_NB.float() * codes.scales_GN[0][:, None]


def random_matrix(seed: int, rows: int = 200, inner: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy_tails = torch.randn(rows, inner, generator=generator) ** 3
    return heavy_tails * 10 ** (4 * torch.rand(rows, 1, generator=generator) - 5)


def brute_int4(group: np.ndarray) -> float:
    """The least squared error of any of the spans, worked out for one group alone."""
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    errors = []
    for span in INT4_SPANS:
        scale = float(np.float16((high - low) * span / 15)) or 1.0
        zero = min(max(round(-low * span / scale), 0), 15)
        codes = np.clip(np.rint(group / scale) + zero, 0, 15)
        errors.append((((codes - zero) * scale - group) ** 2).sum())
    return float(min(errors))


def brute_int8(row: np.ndarray) -> float:
    scales = [float(np.float32(np.abs(row).max() * span / 127)) or 1.0 for span in INT8_SPANS]
    return float(min(((np.clip(np.rint(row / s), -127, 127) * s - row) ** 2).sum() for s in scales))


@pytest.mark.parametrize(("stored", "way"), WAYS)
def test_the_best_of_all_scales_is_taken_for_each_group(stored: Quantized, way: Way) -> None:
    w_ND = random_matrix(3)
    errors_PX = (decoded(quantized(w_ND, stored, way)) - w_ND).double().square().view(-1, stored.group or 128)
    places = w_ND.double().numpy().reshape(errors_PX.shape)
    brute = [(brute_int4 if stored.group else brute_int8)(place) for place in places]
    np.testing.assert_allclose(errors_PX.sum(1).numpy(), brute, rtol=1e-3)
    assert len(set(np.round(errors_PX.sum(1).numpy(), 12))) > 100


def test_long_rows_of_int8_are_cut_off_where_that_pays() -> None:
    """Of 4096 weights many gain by finer steps, and few lose by being cut off; of 128 none is."""
    w_ND = torch.randn(24, 4096, generator=torch.Generator().manual_seed(7))
    made = quantized(w_ND, INT8)
    errors_N = (decoded(made) - w_ND).double().square().sum(1)
    np.testing.assert_allclose(errors_N.numpy(), [brute_int8(row) for row in w_ND.double().numpy()], rtol=1e-5)
    spans_N = made.scales_GN[0] * 127 / w_ND.abs().amax(1)
    assert len(set(spans_N.mul(64).round().tolist())) > 2


@given(seed=st.integers(0, 2**31), exponent=st.integers(-10, 4), group=st.sampled_from([32, 64, 128]))
@settings(max_examples=25, deadline=None)
def test_weights_that_are_int4_already_stay_as_they_are(seed: int, exponent: int, group: int) -> None:
    """Every code occurs in every group, and scales are such as float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    codes_PX = torch.stack([torch.randperm(group, generator=generator) % 16 for _ in range(6 * 256 // group)])
    zero_P1 = torch.randint(0, 16, (len(codes_PX), 1), generator=generator)
    w_ND = ((codes_PX - zero_P1) * 2.0**exponent).view(6, 256)
    assert torch.equal(decoded(quantized(w_ND, Quantized(ExpertFormat.INT4, group))), w_ND)


@pytest.mark.parametrize(("stored", "way"), WAYS)
def test_zeros_and_lone_weights_stay_as_they_are(stored: Quantized, way: Way) -> None:
    w_ND = torch.zeros(3, 128)
    w_ND[1, 70] = 1.5
    w_ND[2, 5] = -(2.0**-9)
    torch.testing.assert_close(decoded(quantized(w_ND, stored, way)), w_ND, rtol=1e-3, atol=0)


@pytest.mark.parametrize("way", [OP_BY_OP, pytest.param(COMPILED, id="compiled", marks=needs_compiler)])
def test_a_scale_that_rounds_to_zero_is_not_taken_where_there_is_a_better_one(way: Way) -> None:
    """Float16 holds the largest of the scales of these weights, but not the others."""
    w_ND = torch.linspace(0, 5.5e-7, 128)[None]
    made = quantized(w_ND, INT4_128, way)
    assert made.scales_GN.item() > 0
    assert (decoded(made) - w_ND).double().square().sum() < w_ND.double().square().sum() / 2


def read(store: QuantizingStore, expert: ExpertId) -> Tensor:
    row_B = aligned_rows(1, store.layout.slot_bytes)[0].fill_(0xFF)
    store.read(expert, row_B)
    return row_B


@pytest.mark.parametrize("stored", [INT8, INT4], ids=str)
def test_a_row_has_each_matrix_in_its_place(stored: Quantized) -> None:
    source = ArrayStore(num_layers=1, num_experts=3)
    store = QuantizingStore(source, stored)
    squares = torch.zeros(2, dtype=torch.float64)
    for expert in source.experts:
        row_B = read(store, expert)
        floats = source.layout.weights(source.row(expert)[None])
        weights = store.layout.weights(row_B[None])
        for ours, w_ND in ((weights.w13, floats.w13_SNH[0].float()), (weights.w2, floats.w2_SHI[0].float())):
            assert torch.equal(dense(ours, 0), decoded(quantized(w_ND, stored)))
            squares += torch.stack([(dense(ours, 0) - w_ND).double().square().sum(), w_ND.double().square().sum()])
        assert not any(row_B[start:stop].any() for start, stop in store.layout.gaps)
    assert store.weight_error == pytest.approx(float((squares[0] / squares[1]) ** 0.5))
    assert 0.001 < store.weight_error < (0.02 if stored is INT8 else 0.15)


class InParts(ArrayStore):
    """Gives its rows in parts, as a checkpoint does."""

    def parts(self, expert: ExpertId) -> list[RowPart]:
        return float_parts(self.layout, 8 << 10)

    def read_part(self, expert: ExpertId, part: RowPart, part_B: Tensor) -> None:
        part_B.copy_(self.row(expert)[part.start : part.stop])


@pytest.mark.parametrize("stored", [INT8, INT4], ids=str)
def test_floats_in_parts_give_the_same_row(stored: Quantized) -> None:
    layout, expert = ExpertLayout(torch.float32, 64, 96), ExpertId(0, 1)
    stores = [QuantizingStore(kind(layout, 1, 2), stored) for kind in (ArrayStore, InParts)]
    assert len(InParts(layout, 1, 2).parts(expert)) == 6 + 2
    whole_B, parted_B = (read(store, expert) for store in stores)
    assert torch.equal(whole_B, parted_B)
    assert stores[0].weight_error == pytest.approx(stores[1].weight_error)


class Meeting(ArrayStore):
    """Reads an expert only together with another one."""

    def __init__(self) -> None:
        super().__init__(num_layers=1, num_experts=2)
        self.waits = Barrier(2, timeout=1.0)

    def read_part(self, expert: ExpertId, part: RowPart, part_B: Tensor) -> None:
        self.waits.wait()
        super().read_part(expert, part, part_B)


def read_both(way: Way) -> None:
    store = QuantizingStore(Meeting(), INT8, way)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(read, store), [ExpertId(0, 0), ExpertId(0, 1)]))


def test_ops_make_two_experts_at_a_time_and_loops_that_take_all_cores_one() -> None:
    read_both(OP_BY_OP)
    with pytest.raises(BrokenBarrierError):
        read_both(Way.compiled())


def test_weights_that_are_no_numbers_are_refused() -> None:
    source = ArrayStore(num_layers=1, num_experts=2)
    source.layout.weights(source.row(ExpertId(0, 1))[None]).w2_SHI[0, 3, 4] = float("nan")
    store = QuantizingStore(source, INT4)
    read(store, ExpertId(0, 0))
    with pytest.raises(CopyError, match="expert 0/1: not all weights are finite numbers"):
        read(store, ExpertId(0, 1))


@pytest.mark.parametrize(("stored", "way"), WAYS)
def test_the_largest_finite_weights_are_taken(stored: Quantized, way: Way) -> None:
    """Their range and their squares are beyond what float32 holds; a pack of such is of little use, but no failure."""
    w_ND = torch.full((3, 128), torch.finfo(torch.bfloat16).max)
    w_ND[:, 1::2] *= -1
    assert decoded(quantized(w_ND, stored, way)).isfinite().all()
    for wrong in (float("nan"), float("inf"), -float("inf")):
        w_ND[1, 2] = wrong
        with pytest.raises(CopyError, match="not all weights are finite numbers"):
            quantized(w_ND, stored, way)


@pytest.mark.parametrize("stored", KINDS, ids=str)
def test_blocks_and_dtypes_leave_no_trace(stored: Quantized) -> None:
    w_ND = random_matrix(5).bfloat16()
    whole = quantized(w_ND, stored)
    for same_ND in (w_ND, w_ND.float()):
        parted = quantized(same_ND, stored, OP_BY_OP._replace(block_weights=8 * 128))
        assert torch.equal(parted.data_NB, whole.data_NB) and torch.equal(parted.scales_GN, whole.scales_GN)


@pytest.mark.parametrize("stored", KINDS, ids=str)
def test_every_block_is_searched_once_and_nothing_beside_them(stored: Quantized) -> None:
    """Whatever is left over: what is made lies where it belongs, and what surrounds it is as it was."""
    w_ND = random_matrix(6)
    whole = decoded(quantized(w_ND, stored))
    for rows in (1, 3, 8, 9, 16, 21):
        found = decoded(quantized(w_ND[:rows], stored, OP_BY_OP._replace(block_weights=8 * 128)))
        assert torch.equal(found, whole[:rows])


@needs_compiler
@pytest.mark.parametrize("stored", [INT8, INT4_128], ids=str)
def test_compiled_loops_choose_what_ops_do(stored: Quantized) -> None:
    """But for sums of another order where two scales are all but equally good."""
    w_ND = random_matrix(9, rows=300)
    ops, loops = (quantized(w_ND, stored, way) for way in (OP_BY_OP, COMPILED))
    same_P = ops.scales_GN == loops.scales_GN
    assert same_P.float().mean() > 0.98
    assert torch.equal(ops.data_NB[same_P[0]], loops.data_NB[same_P[0]])


def test_a_compiler_that_fails_is_done_without() -> None:
    """Some have a compiler, and not what it takes."""

    def fail(*_: object) -> None:
        raise RuntimeError("Python.h: no such file\nand much more")

    w_ND = random_matrix(4)
    with pytest.warns(UserWarning, match=r"op by op, more slowly: compiling failed \(Python.h: no such file\)"):
        found = quantized(w_ND, INT4, Way(fail, 1 << 20))
    assert torch.equal(decoded(found), decoded(quantized(w_ND, INT4)))


def test_rows_of_a_large_model_are_3_8_times_smaller() -> None:
    """Mixtral's: 4096 x 14336 in bfloat16 against int4 in groups of 128, int8."""
    sizes = [
        ExpertLayout(stored, 4096, 14336).slot_bytes
        for stored in (torch.bfloat16, Quantized(ExpertFormat.INT4, 128), INT8)
    ]
    assert sizes[0] / sizes[1] > 3.8 and sizes[0] / sizes[2] > 1.99
