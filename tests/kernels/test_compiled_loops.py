"""Work compiled once for each shape, called from any thread."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from duoserve.kernels.compiled.loops import CompiledLoops
from tests.helpers.compiled_case import needs_compiler

pytestmark = needs_compiler


def doubled(x_N: Tensor, out_N: Tensor) -> None:
    out_N.copy_(x_N * 2)


def picked(x_N: Tensor, places_M: Tensor, out_M: Tensor) -> None:
    out_M.copy_(x_N[places_M])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> tuple[CompiledLoops, list[Callable[[], object]]]:
    """Loops, and what they have compiled so far."""
    loops, recorded = CompiledLoops(), []
    record = loops._compiler.record
    monkeypatch.setattr(loops._compiler, "record", lambda work: recorded.append(work) or record(work))
    return loops, recorded


def test_a_shape_is_compiled_once_whatever_memory_has_it(compiled) -> None:
    loops, recorded = compiled
    for size in (8, 12, 8):
        for seed in range(2):
            x_N = torch.randn(size, generator=torch.Generator().manual_seed(seed))
            out_N = torch.empty(size)
            loops(doubled, x_N, out_N)
            assert torch.equal(out_N, x_N * 2)
    assert len(recorded) == 2


def test_a_stride_is_a_shape_of_its_own(compiled) -> None:
    loops, recorded = compiled
    x_N, out_N = torch.arange(16.0), torch.empty(8)
    for step, first in ((1, 0), (2, 0), (2, 1)):
        loops(doubled, x_N[first::step][:8], out_N)
        assert torch.equal(out_N, x_N[first::step][:8] * 2)
    assert len(recorded) == 2


def test_indices_need_not_be_valid_in_memory_that_nobody_has_filled(compiled) -> None:
    loops, _ = compiled
    out_M = torch.empty(3)
    loops(picked, torch.arange(4.0), torch.tensor([3, 0, 2]), out_M)
    assert out_M.tolist() == [3, 0, 2]


def test_preparing_writes_nothing_and_a_call_then_waits_for_nothing(compiled) -> None:
    loops, recorded = compiled
    x_N, out_N = torch.ones(8), torch.full((8,), 7.0)
    loops.prepare(doubled, x_N, out_N)
    assert out_N.tolist() == [7] * 8
    loops(doubled, x_N, out_N)
    assert out_N.tolist() == [2] * 8
    assert len(recorded) == 1


def test_what_was_given_is_not_held(compiled) -> None:
    loops, _ = compiled
    x_N, out_N = torch.ones(8), torch.empty(8)
    gone = weakref.ref(x_N), weakref.ref(out_N)
    loops(doubled, x_N, out_N)
    del x_N, out_N
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_they_run_where_the_tensors_are_whatever_the_default_device(compiled) -> None:
    loops, recorded = compiled
    x_N, out_N = torch.arange(8.0), torch.empty(8)
    with torch.device("meta"):
        loops(doubled, x_N, out_N)
    assert torch.equal(out_N, x_N * 2)
    assert [tensor.device for tensor in recorded[0].args] == [x_N.device] * 2


def test_threads_that_call_at_once_each_get_their_own(compiled) -> None:
    """Also when they meet what is not compiled yet."""
    loops, recorded = compiled

    def call(value: int) -> list[float]:
        x_N, out_N = torch.full((64,), float(value)), torch.empty(64)
        loops(doubled, x_N, out_N)
        return out_N.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(40))) == [[2.0 * value] * 64 for value in range(40)]
    assert len(recorded) == 1
