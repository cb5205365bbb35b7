"""What PyTorch's compiler has made is taken from the disk, and used, only where it is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpu_vec_isa import pick_vec_isa

from duoserve.kernels.compiled.compiler import CpuCompiler
from tests.helpers.compiled_case import needs_compiler
from tests.kernels.common import assert_same_bits

pytestmark = needs_compiler
X_N = torch.arange(1000.0)


@pytest.fixture
def no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def sums() -> Tensor:
    return X_N * 3 + X_N.flip(0)


def found_on_disk() -> int:
    """How much of what a recording needs; it is right in any case."""
    counters.clear()
    recording = CpuCompiler().record(sums)
    recording.result.zero_()
    recording.replay()
    assert_same_bits(recording.result, sums())
    return counters["inductor"]["fxgraph_cache_hit"]


@pytest.mark.usefixtures("no_code")
def test_code_is_found_again() -> None:
    assert found_on_disk() == 0
    assert found_on_disk() == 1


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("narrow", ["avx2", "default"])
def test_code_for_other_vectors_is_not_taken(narrow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pick_vec_isa()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", narrow)
    same = pick_vec_isa().bit_width() == own.bit_width()
    found_on_disk()
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert found_on_disk() == same


@pytest.mark.usefixtures("no_code")
def test_the_instructions_are_those_that_pytorch_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, load = [], CppPythonBindingsCodeCache.load_pybinding_async
    monkeypatch.setattr(
        CppPythonBindingsCodeCache,
        "load_pybinding_async",
        lambda *call, **options: chosen.append(str(pick_vec_isa())) or load(*call, **options),
    )
    found_on_disk()
    assert chosen == [str(pick_vec_isa())]


def test_a_recording_goes_on_where_torch_gets_other_threads() -> None:
    before, x_MN = torch.get_num_threads(), torch.arange(1 << 18, dtype=torch.float32).view(64, -1)
    torch.set_num_threads(2)
    try:
        recording = CpuCompiler().record(lambda: ((x_MN / 7).sum(0, keepdim=True), (x_MN / 3).sum().view(1)))
        recording.replay()
        wanted = [each.clone() for each in recording.result]
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            for each in recording.result:
                each.zero_()
            recording.replay()
            for ours, theirs in zip(recording.result, wanted, strict=True):
                assert_same_bits(ours, theirs)
    finally:
        torch.set_num_threads(before)
