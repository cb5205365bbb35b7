"""Dense weights in memory of their own."""

from __future__ import annotations

import pytest
import torch

from duoserve import MoEModel
from duoserve.errors import MemoryBudgetError
from duoserve.experts.rows import DenseMemory
from duoserve.models.layers import Linear


def _sizes(*tensors: torch.Tensor) -> list[int]:
    return [tensor.nbytes for tensor in tensors]


def test_tensors_of_all_kinds_are_kept_bit_by_bit() -> None:
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.tensor(3), torch.randn(2, 33).half(), torch.ones(0)]
    memory = DenseMemory(_sizes(*tensors))
    kept = [memory.keep(tensor) for tensor in tensors]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(kept, tensors, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel()}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept)


def test_what_finds_no_room_stays_where_it_is() -> None:
    large = torch.randn(65)
    assert DenseMemory([64]).keep(large) is large


def test_memory_that_the_system_refuses_is_an_error_of_ours() -> None:
    with pytest.raises(MemoryBudgetError, match=str(1 << 60)):
        DenseMemory([1 << 60])


def test_parts_that_lie_side_by_side_are_one_matrix_without_a_copy() -> None:
    parts = [torch.randn(rows, 16) for rows in (4, 8, 2)]
    memory = DenseMemory(_sizes(*parts))
    kept = [Linear(memory.keep(part)) for part in parts]
    stacked = Linear.stacked(kept).weight_NK
    assert torch.equal(stacked, torch.cat(parts))
    assert stacked.data_ptr() == kept[0].weight_NK.data_ptr()


@pytest.mark.parametrize("between", [1, 0], ids=["a tensor between them", "another order"])
def test_other_parts_are_copied(between: int) -> None:
    parts, other = [torch.randn(rows, 16) for rows in (4, 8)], torch.randn(3)
    memory = DenseMemory(_sizes(*parts, other))
    kept = [Linear(memory.keep(parts[0]))]
    if between:
        memory.keep(other)
    kept.append(Linear(memory.keep(parts[1])))
    order = slice(None) if between else slice(None, None, -1)
    stacked = Linear.stacked(kept[order]).weight_NK
    assert torch.equal(stacked, torch.cat(parts[order]))
    assert stacked.untyped_storage().data_ptr() != kept[0].weight_NK.untyped_storage().data_ptr()


def test_the_weights_of_a_loaded_model_lie_in_one_memory() -> None:
    with MoEModel.from_pretrained("bard", expert_slots=12) as model, model.lend() as runtime:
        transformer = runtime.engine._passes._model
        weights = [transformer.embed_VH, *(layer.attention.qkv.weight_NK for layer in transformer.layers)]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
