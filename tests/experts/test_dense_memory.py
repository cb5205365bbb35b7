"""Dense weights in memory of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch

from duoserve import MoEModel
from duoserve.errors import MemoryBudgetError
from duoserve.experts.rows import DenseMemory
from duoserve.models.layers import Linear
from duoserve.models.tensors import Tensors
from tests.models.cases import FAMILIES


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


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One matrix of all their rows, each part read as it lies."""
    in_turn = iter(parts)
    tensors = Tensors(lambda *_: next(in_turn))
    return Linear.load_stacked([(tensors, len(part)) for part in parts], 16).weight_NK


def test_parts_that_lie_side_by_side_are_one_matrix_without_a_copy() -> None:
    parts = [torch.randn(rows, 16) for rows in (4, 8, 2)]
    memory = DenseMemory(_sizes(*parts))
    kept = [memory.keep(part) for part in parts]
    stacked = joined(kept)
    assert torch.equal(stacked, torch.cat(parts))
    assert stacked.data_ptr() == kept[0].data_ptr()


@pytest.mark.parametrize("between", [1, 0], ids=["a tensor between them", "another order"])
def test_other_parts_are_copied(between: int) -> None:
    parts, other = [torch.randn(rows, 16) for rows in (4, 8)], torch.randn(3)
    memory = DenseMemory(_sizes(*parts, other))
    kept = [memory.keep(parts[0])]
    if between:
        memory.keep(other)
    kept.append(memory.keep(parts[1]))
    order = slice(None) if between else slice(None, None, -1)
    stacked = joined(kept[order])
    assert torch.equal(stacked, torch.cat(parts[order]))
    assert stacked.untyped_storage().data_ptr() != kept[0].untyped_storage().data_ptr()


def linears(part: object) -> Iterator[Linear]:
    """Those that a model is made of."""
    if isinstance(part, Linear):
        yield part
    elif isinstance(part, tuple):
        yield from chain.from_iterable(map(linears, part))
    elif is_dataclass(part):
        yield from chain.from_iterable(linears(getattr(part, field.name)) for field in fields(part))


def matrices_elsewhere(folder: Path | str) -> list[torch.Size]:
    """The shapes of the dense matrices and biases of a loaded model that do not lie where its embedding does."""
    with MoEModel.from_pretrained(folder, expert_slots=12) as model, model.lend() as runtime:
        transformer = runtime.engine._passes._model
        memory = transformer.embed_VH.untyped_storage().data_ptr()
        parts = [part for linear in linears(transformer.layers) for part in (linear.weight_NK, linear.bias_N)]
        assert len(parts) > 2 * len(transformer.layers)
        used = [part for part in parts if part is not None]
        return [part.shape for part in used if part.untyped_storage().data_ptr() != memory]


def test_the_weights_of_a_loaded_model_lie_in_one_memory() -> None:
    assert matrices_elsewhere("bard") == []


@pytest.mark.parametrize(("model_type", "case"), [(family, cases.hard) for family, cases in FAMILIES.items()])
def test_so_they_do_in_every_family(model_type: str, case: str, tmp_path: Path) -> None:
    assert matrices_elsewhere(FAMILIES[model_type].save(tmp_path, case)) == []
