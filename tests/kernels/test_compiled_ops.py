"""The small ops of prompts, compiled once for all numbers of rows: the twins' numbers, and bits of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.codecache import CppPythonBindingsCodeCache

from duoserve import kernels
from duoserve.kernels import reference
from duoserve.kernels.compiled import inductor
from duoserve.kernels.compiled import ops as compiled_ops
from duoserve.kernels.compiled.inductor import compile_for_rows
from duoserve.kernels.small_ops import SmallOps
from tests.helpers.compiled_case import needs_compiler
from tests.kernels.common import assert_close, assert_same_bits

ROWS = (1, 2, 3, 31, 32, 33, 64, 100, 271)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, TOP_K = 80, 4, 2, 32, 3
NAMES = ("rms_norm", "rms_norm of heads", "add_rms_norm", "rope_write_kv", "moe_combine", "moe_combine, shared")
IN_FLOAT32 = ("rms_norm", "rope_write_kv", "moe_combine, shared")  # of all, in whole models: see test_compiled_prompts


@pytest.fixture(scope="module")
def ops() -> SmallOps:
    return compiled_ops.compiled_ops()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Whatever the tests have: loops are made for as many threads as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Operands:
    """Of ``num_rows`` random rows, of which the first are always the same; as a model has them, views and all."""

    def __init__(self, num_rows: int, dtype: torch.dtype) -> None:
        self._num_rows, self._dtype = num_rows, dtype
        self._generator = torch.Generator().manual_seed(0)

    def of(self, name: str) -> tuple[Any, ...]:
        x_TH, weight_H = self._rows(HIDDEN), self._random(HIDDEN)
        heads = self._rows((HEADS + 2 * KV_HEADS) * HEAD_DIM).view(self._num_rows, -1, HEAD_DIM)
        q_THD, k_TGD, v_TGD = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        match name:
            case "rms_norm":
                return x_TH, weight_H, 1e-5
            case "rms_norm of heads":
                return q_THD, self._random(HEAD_DIM), 1e-6
            case "add_rms_norm":
                return x_TH, self._rows(HIDDEN), weight_H, 1e-5
            case "rope_write_kv":
                angles = kernels.rope_table(torch.arange(300), kernels.rope_frequencies(HEAD_DIM, 1e4), self._dtype)
                pages = [torch.zeros(5, 64, KV_HEADS, HEAD_DIM, dtype=self._dtype) for _ in range(2)]
                places_T = torch.randperm(300, generator=torch.Generator().manual_seed(1))[: self._num_rows]
                return q_THD, k_TGD, v_TGD, *[part[: self._num_rows] for part in angles], *pages, places_T
        y_TKH, weights_TK = self._rows(TOP_K * HIDDEN).view(-1, TOP_K, HIDDEN), self._rows(TOP_K).float().abs()
        return (y_TKH, weights_TK) if name == "moe_combine" else (y_TKH, weights_TK, x_TH)

    def _rows(self, width: int) -> Tensor:
        return torch.randn(300, width, generator=self._generator).to(self._dtype)[: self._num_rows]

    def _random(self, size: int) -> Tensor:
        return torch.randn(size, generator=self._generator).to(self._dtype)


def results(op: Callable[..., Any], operands: tuple[Any, ...]) -> list[Tensor]:
    """What it gives, and the pages that it has written."""
    out = op(*operands)
    pages = [each for each in operands if isinstance(each, Tensor) and each.dim() == 4]
    return [*(out if isinstance(out, (tuple, list)) else [out]), *pages]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in NAMES), *((name, torch.float32) for name in IN_FLOAT32)]
)
def test_the_numbers_are_those_of_the_twin(ops: SmallOps, name: str, dtype: torch.dtype) -> None:
    op = name.split(" ", maxsplit=1)[0].rstrip(",")
    for num_rows in ROWS:
        ours = results(getattr(ops, op), Operands(num_rows, dtype).of(name))
        theirs = results(getattr(kernels, op), Operands(num_rows, dtype).of(name))
        for mine, twin in zip(ours, theirs, strict=True):
            assert mine.dtype == twin.dtype
            assert_close(mine, twin.double(), dtype, roundings=2)


@needs_compiler
@pytest.mark.parametrize("name", NAMES[:4])
def test_no_row_changes_the_bits_of_another(ops: SmallOps, name: str) -> None:
    op = getattr(ops, name.split(" ", maxsplit=1)[0])
    whole = results(op, Operands(271, torch.bfloat16).of(name))
    for num_rows in (2, 3, 31, 33, 100):
        part = results(op, Operands(num_rows, torch.bfloat16).of(name))
        for ours, theirs in zip(part, whole, strict=True):
            if ours.dim() < 4:
                assert_same_bits(ours, theirs[:num_rows])


@needs_compiler
def test_an_op_is_compiled_once_for_all_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, ops = [], compiled_ops.compiled_ops()
    monkeypatch.setattr(inductor, "compile_for_rows", lambda *call: compiled.append(call) or compile_for_rows(*call))
    for num_rows in ROWS:
        ops.rms_norm(*Operands(num_rows, torch.float32).of("rms_norm"))
    assert len(compiled) == 1
    x_TH, weight_H, _ = Operands(5, torch.float32).of("rms_norm")
    ops.rms_norm(x_TH, weight_H, 1e-6)
    assert len(compiled) == 2


@needs_compiler
def test_padding_is_written_nowhere(ops: SmallOps) -> None:
    operands = Operands(40, torch.float32).of("rope_write_kv")
    operands[-1][30:] = -1
    _, *ours = results(ops.rope_write_kv, operands)
    expected = Operands(40, torch.float32).of("rope_write_kv")
    expected[-1][30:] = -1
    _, *theirs = results(kernels.rope_write_kv, expected)
    for mine, twin in zip(ours, theirs, strict=True):
        assert_close(mine, twin.double(), torch.float32)


@needs_compiler
def test_code_that_only_some_numbers_of_rows_get_is_given_to_no_others() -> None:
    """The tracer would follow the branch that it has taken."""

    def work(x_N: Tensor) -> Tensor:
        return x_N * 2 if x_N.shape[0] < 10 else x_N * 3

    for _ in range(2):  # the second time it comes from Inductor's cache
        compiled = compile_for_rows(work, [torch.empty(4)], [False])
        for size in (2, 9, 10, 64):
            assert_same_bits(compiled(torch.ones(size)), work(torch.ones(size)))


def test_one_row_is_computed_by_the_ops_of_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_for_rows", None)
    operands = Operands(1, torch.bfloat16).of("add_rms_norm")
    for ours, theirs in zip(
        compiled_ops.compiled_ops().add_rms_norm(*operands), reference.add_rms_norm(*operands), strict=True
    ):
        assert_same_bits(ours, theirs)


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["rms_norm", "rope_write_kv", "moe_combine"])
def test_loops_are_shared_out_among_threads_though_the_example_is_short(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    load = CppPythonBindingsCodeCache.load_pybinding_async
    monkeypatch.setattr(
        CppPythonBindingsCodeCache,
        "load_pybinding_async",
        lambda argtypes, source, *more, **options: sources.append(source) or load(argtypes, source, *more, **options),
    )
    getattr(compiled_ops.compiled_ops(), name)(*Operands(2, torch.bfloat16).of(name))
    assert sources
    assert all("#pragma omp for" in source for source in sources)
