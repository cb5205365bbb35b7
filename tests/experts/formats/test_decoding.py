"""Every format decodes to exactly what its description says: against encoders that know nothing of the decoders."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from duoserve.architecture import Quantization
from duoserve.errors import CheckpointError
from duoserve.experts.formats.codes import Codes
from duoserve.experts.formats.expert_row import RowWriter, down_first
from duoserve.experts.formats.reading import format_of
from duoserve.experts.formats.scratch import Scratch
from duoserve.experts.layout import ExpertLayout, Quantized
from duoserve.experts.pieces import MatrixName
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat, ExpertWeights
from tests.experts.formats.tensor_rows import TensorRows
from tests.helpers import encoders
from tests.helpers.encoders import Encode, Encoded

GPTQ = partial(Quantization, "gptq", symmetric=False)
V1, V2 = partial(encoders.gptq, version=1), partial(encoders.gptq, version=2)
SHUFFLED = np.random.default_rng(5).permutation(192)
ROLES = {"weight_scale_inv": "scales", "weight": "data", "blocks": "data", "qweight": "data"}

CASES: dict[str, tuple[Quantization, Encode]] = {
    "fp8": (Quantization("fp8"), encoders.fp8),
    "fp8, bfloat16 scales": (Quantization("fp8"), partial(encoders.fp8, scale_dtype=torch.bfloat16)),
    "mxfp4": (Quantization("mxfp4"), encoders.mxfp4),
    "awq, 32": (Quantization("awq", 32), partial(encoders.awq, group=32)),
    "awq, 128 and a rest": (Quantization("awq", 128), partial(encoders.awq, group=128)),
    "awq, all": (Quantization("awq", 0), partial(encoders.awq, group=192)),
    "awq, bfloat16 scales": (
        Quantization("awq", 64),
        partial(encoders.awq, group=64, scale_dtype=torch.bfloat16),
    ),
    "gptq v1": (GPTQ(64, less_one=True), partial(V1, group=64)),
    "gptq v2": (GPTQ(64), partial(V2, group=64)),
    "gptq v1, symmetric": (GPTQ(32, less_one=True, symmetric=True), partial(V1, group=32, symmetric=True)),
    "gptq v2 that says v1": (GPTQ(32, less_one=True, symmetric=True), partial(V2, group=32, symmetric=True)),
    "gptq v1, ordered": (GPTQ(64, less_one=True, ordered=True), partial(V1, group=64, order_D=SHUFFLED)),
    "gptq v2, ordered, 128 and a rest": (GPTQ(128, ordered=True), partial(V2, group=128, order_D=SHUFFLED)),
    "gptq, ordered, all": (GPTQ(0, ordered=True), partial(V2, group=192, order_D=SHUFFLED)),
}


def codes_of(quantization: Quantization, encoded: Encoded) -> Codes:
    parts = {ROLES.get(role, role): tensor for role, tensor in encoded.tensors.items()}
    return format_of(quantization).codes(TensorRows(parts.pop("data")), parts)


def fill_row(weights: ExpertWeights, codes: dict[MatrixName, Codes]) -> None:
    """Writes all matrices of an expert into the one slot of ``weights``."""
    writer = RowWriter(weights, Scratch())
    for matrix in sorted(codes, key=down_first):
        writer.add(matrix, codes[matrix])
    writer.finish()


def random_matrix(seed: int, num_rows: int = 136, inner: int = 192) -> Tensor:
    """Lopsided, so that zero-points of 0 and 15 occur, and of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(seed)
    shift, size = torch.rand(2, num_rows, 1, generator=generator)
    return (torch.randn(num_rows, inner, generator=generator) + 8 * shift - 4) * 10 ** (4 * size - 3)


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_means_what_it_should(case: str) -> None:
    quantization, encode = CASES[case]
    encoded = encode(random_matrix(1))
    assert torch.equal(codes_of(quantization, encoded).dense(), encoded.weight_ND)


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_called_and_shaped_as_their_format_says(case: str) -> None:
    quantization, encode = CASES[case]
    tensors = encode(random_matrix(1)).tensors
    form = format_of(quantization)
    parts = form.parts("m.weight" if quantization.method != "mxfp4" else "m", 136, 192).values()
    joint = "_" if quantization.method == "mxfp4" else "."
    assert {part.name: part.tensor.shape for part in parts} == {
        f"m{joint}{name}": tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert all(tensors[part.name[2:]].dtype in part.tensor.dtypes for part in parts)


def test_words_have_every_zero_point_in_every_place() -> None:
    """Also a zero-point of 0 beside others, from which version 1 borrows."""
    zeros_GN = torch.arange(256).reshape(16, 16).remainder(17).remainder(16)
    words = encoders._words(zeros_GN.numpy(), tuple(range(8)))
    stored = encoders._signed((words - 0x11111111) % 2**32)
    parts = {
        "qzeros": stored,
        "scales": torch.ones(16, 16, dtype=torch.float16),
        "g_idx": torch.arange(512, dtype=torch.int32) // 32,
    }
    found = format_of(GPTQ(32, less_one=True)).codes(TensorRows(torch.zeros(64, 16, dtype=torch.int32)), parts)
    assert found.zeros_GN is not None and torch.equal(found.zeros_GN, zeros_GN.to(torch.uint8))


STORED: dict[str, Quantized] = {
    "fp8": Quantized(ExpertFormat.FP8),
    "awq, 32": Quantized(ExpertFormat.INT4, 32),
    "awq, bfloat16 scales": Quantized(ExpertFormat.INT4, 32, torch.bfloat16),
    "gptq v1": Quantized(ExpertFormat.INT4, 64),
    "gptq v1, symmetric": Quantized(ExpertFormat.INT4, 32),
    "awq, all": Quantized(ExpertFormat.INT4, 64),
    "awq, 128 and a rest": Quantized(ExpertFormat.INT4, 64),
}


@pytest.mark.parametrize("case", STORED)
def test_a_row_means_what_its_matrices_do(case: str) -> None:
    """H 192, I 320 (I 136 in fp8): gate and up rows in turn, whole and cut blocks and groups."""
    quantization, encode = CASES[case]
    inter = 136 if case == "fp8" else 320
    if case == "awq, all":
        encode = lambda w_ND: encoders.awq(w_ND, group=w_ND.shape[1])  # noqa: E731
    gate, up, down = (
        encode(random_matrix(seed, *shape)) for seed, shape in enumerate([(inter, 192)] * 2 + [(192, inter)])
    )
    layout = ExpertLayout(STORED[case], 192, inter)
    weights = layout.weights(torch.full((1, layout.slot_bytes), 0xFF, dtype=torch.uint8))
    fill_row(weights, {n: codes_of(quantization, m) for n, m in (("gate", gate), ("up", up), ("down", down))})
    w13_NH = dense(weights.w13, 0)
    assert torch.equal(w13_NH[0::2], gate.weight_ND) and torch.equal(w13_NH[1::2], up.weight_ND)
    assert torch.equal(dense(weights.w2, 0), down.weight_ND)
    for rows in (slice(0, 7), slice(130, 300)):
        assert torch.equal(dense(weights.w13, 0, rows), w13_NH[rows])


def ordered_row(gate_order: np.ndarray, up_order: np.ndarray) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """w13 and w2 of a row, the matrices that were encoded, and the order of the down projection's inputs."""
    form, rng = GPTQ(32, ordered=True), np.random.default_rng(8)
    down_order = rng.permutation(64)
    shapes = ((64, 192), (64, 192), (192, 64))
    encoded = [
        encoders.gptq(random_matrix(i, *shape), 32, version=2, order_D=order)
        for i, (shape, order) in enumerate(zip(shapes, (gate_order, up_order, down_order), strict=True))
    ]
    layout = ExpertLayout(Quantized(ExpertFormat.INT4, 32, ordered=True), 192, 64)
    weights = layout.weights(torch.zeros(1, layout.slot_bytes, dtype=torch.uint8))
    codes = [codes_of(form, matrix) for matrix in encoded]
    fill_row(weights, dict(zip(("gate", "up", "down"), codes, strict=True)))
    order_I = codes[2].order_D
    assert order_I is not None
    return dense(weights.w13, 0), dense(weights.w2, 0), [matrix.weight_ND for matrix in encoded], order_I


def test_an_order_of_features_is_undone() -> None:
    """What gate and up make is in the order in which down takes it."""
    w13_NH, w2_HI, (gate, up, down), order_I = ordered_row(SHUFFLED, SHUFFLED)
    assert not torch.equal(order_I, torch.arange(64))
    assert torch.equal(w13_NH[0::2], gate[order_I]) and torch.equal(w13_NH[1::2], up[order_I])
    assert torch.equal(w2_HI, down[:, order_I])


def test_two_orders_in_one_row_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"gate and up have features in different orders \(g_idx\)"):
        ordered_row(SHUFFLED, SHUFFLED[::-1].copy())


def test_scales_of_another_dtype_than_the_rows_are_refused() -> None:
    encoded = encoders.awq(random_matrix(1, 64, 64), 32)
    layout = ExpertLayout(Quantized(ExpertFormat.INT4, 32, torch.bfloat16), 64, 64)
    weights = layout.weights(torch.zeros(1, layout.slot_bytes, dtype=torch.uint8))
    codes = codes_of(Quantization("awq", 32), encoded)
    with pytest.raises(CheckpointError, match=r"scales are torch\.float16, those of other experts torch\.bfloat16"):
        fill_row(weights, {"gate": codes, "up": codes, "down": codes})


def test_groups_that_make_no_sense_are_refused() -> None:
    encoded = encoders.gptq(random_matrix(1), 64, order_D=SHUFFLED)
    with pytest.raises(CheckpointError, match="features in an order of their own, but desc_act is false"):
        codes_of(GPTQ(64), encoded)
    encoded.tensors["g_idx"][:5] = 1
    with pytest.raises(CheckpointError, match="g_idx does not put 192 features into groups of 64"):
        codes_of(GPTQ(64, ordered=True), encoded)
