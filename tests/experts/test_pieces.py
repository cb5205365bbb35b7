"""Experts out of tensors that hold all of a layer: their rows are the right bytes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from duoserve.experts.layout import ExpertId
from duoserve.experts.rows import aligned_rows
from duoserve.experts.safetensors_header import TensorInfo
from duoserve.models.opened import OpenedModel, opened
from tests.models.cases import FAMILIES
from tests.models.cases.case import SINGLE

EXPERTS = [ExpertId(0, 0), ExpertId(1, 5), ExpertId(2, 7)]


def weights_of(found: OpenedModel, dtype: torch.dtype, expert: ExpertId) -> tuple[Tensor, Tensor]:
    """w13 and w2 as the store packs them, over a row full of NaN; what lies between is zero."""
    store = found.expert_store(dtype)
    row_B = aligned_rows(1, store.layout.slot_bytes)[0].fill_(0xFF)
    store.read(expert, row_B)
    assert not row_B[store.layout.payload_bytes :].any()
    weights = store.layout.weights(row_B[None])
    return weights.w13_SNH[0], weights.w2_SHI[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "case"), [("granitemoe", "top_1_odd_width"), ("granitemoe", "plain")])
def test_gate_rows_before_up_rows(model_type: str, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = FAMILIES[model_type].save(tmp_path, case, torch.bfloat16)
    tensors = load_file(folder / SINGLE)
    with opened(folder) as found:
        for expert in EXPERTS:
            w13_NH, w2_HI = weights_of(found, dtype, expert)
            prefix = f"model.layers.{expert.layer}.block_sparse_moe"
            gate_IH, up_IH = tensors[f"{prefix}.input_linear.weight"][expert.expert].to(dtype).chunk(2)
            assert torch.equal(w13_NH[0::2], gate_IH) and torch.equal(w13_NH[1::2], up_IH)
            assert torch.equal(w2_HI, tensors[f"{prefix}.output_linear.weight"][expert.expert].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["other_activation_odd_width", "plain"])
def test_gate_and_up_columns_in_turn(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = FAMILIES["gpt_oss"].save(tmp_path, case, torch.bfloat16)
    tensors = load_file(folder / SINGLE)
    with opened(folder) as found:
        for expert in EXPERTS:
            w13_NH, w2_HI = weights_of(found, dtype, expert)
            prefix = f"model.layers.{expert.layer}.mlp.experts"
            assert torch.equal(w13_NH, tensors[f"{prefix}.gate_up_proj"][expert.expert].to(dtype).T)
            assert torch.equal(w2_HI, tensors[f"{prefix}.down_proj"][expert.expert].to(dtype).T)


def test_a_part_is_one_range_of_bytes() -> None:
    info = TensorInfo("x", Path("f"), torch.float16, (3, 10, 4), offset=1000, nbytes=240)
    assert info.part() == info
    part = info.part(2, (6, 10))
    assert (part.shape, part.offset, part.nbytes) == ((4, 4), 1000 + 2 * 80 + 6 * 8, 32)
    whole = info.part(1)
    assert (whole.shape, whole.offset, whole.nbytes) == ((10, 4), 1080, 80)
    assert info.part(rows=(1, 3)).shape == (2, 10, 4)
