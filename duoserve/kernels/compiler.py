"""Recordings for a CPU: work is traced once and compiled by Inductor, PyTorch's compiler, to a few fused loops."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from duoserve.kernels.recorder import Recorder, Result
from duoserve.kernels.traced import TracedOps

Compiled = Callable[..., object]

# What Inductor goes by where it need not know the number of rows: loops of few are not shared out among threads.
USUAL_ROWS = 1024


@dataclass(frozen=True)
class CompiledRecording(Generic[Result]):
    """Compiled work, and the memory that it reads and writes."""

    compiled: Compiled
    operands: Sequence[Tensor]
    result: Result

    def replay(self) -> None:
        """As in Recording, done when it returns."""
        self.compiled(*self.operands)

    def on(self, others: Mapping[Tensor, Tensor]) -> CompiledRecording[Result]:
        """The same work on other memory: where it has a key of ``others`` it takes the value, a tensor just like it."""
        return replace(self, operands=[others.get(operand, operand) for operand in self.operands])


class CpuCompiler(Recorder):
    """Work that differs only in the tensors that it reads and writes, as layers do, is compiled once."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._compiled: dict[object, Compiled] = {}

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As in Recorder."""
        return torch.zeros(shape, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """As in Recorder."""
        target.copy_(source)

    @torch.no_grad()
    def record(self, work: Callable[[], Result]) -> CompiledRecording[Result]:
        """As in Recorder: the run for real makes the tensors that replays fill.

        These are the ones in the result's tuples and named tuples. Others that ``work`` makes exist while it runs only.
        """
        result = work()
        graph, operands = _lift(_trace(work, result))
        key = graph.code, tuple((o.dtype, o.shape, o.stride()) for o in operands)
        if key not in self._compiled:
            self._compiled[key] = _compile(graph, operands)
        return CompiledRecording(self._compiled[key], operands, result)

    def wait(self) -> None:
        """As in Recorder: nothing is under way."""


def cpp_compiler() -> str:
    """The C++ compiler that Inductor calls: ``CXX``, or this system's usual one."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def can_compile() -> bool:
    """Whether that compiler is there."""
    return shutil.which(cpp_compiler()) is not None


def _trace(work: Callable[[], Result], result: Result) -> fx.GraphModule:
    """The operations of ``work``, which end by writing what it returns into the tensors of ``result``."""
    targets = pytree.tree_leaves(result)

    def into_result() -> None:
        with TracedOps():
            values = pytree.tree_leaves(work())
        for target, value in zip(targets, values, strict=True):
            if isinstance(target, Tensor) and value is not target:
                target.copy_(value)

    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - see _compile

    return make_fx(into_result, tracing_mode="fake", _allow_non_fake_inputs=True)()


def _lift(traced: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """The same graph with all tensors that it holds as inputs, and these tensors."""
    graph = traced.graph
    held = graph.find_nodes(op="get_attr")
    operands = {node.target: getattr(traced, node.target) for node in held}
    with graph.inserting_before(next(iter(graph.nodes))):
        inputs = {name: graph.placeholder(name) for name in operands}
    for node in held:
        node.replace_all_uses_with(inputs[node.target])
        graph.erase_node(node)
    return fx.GraphModule({}, graph), list(operands.values())


def compile_for_rows(work: Compiled, tensors: Sequence[Tensor], fixed: Sequence[bool]) -> Compiled:
    """``work(*tensors)``, compiled for any number of rows from two on: the first dimension of those that are not fixed.

    What else the tensors are, their strides too, stays as it is; their values do not matter here. ``work`` itself where
    the compiler would make other code for other numbers of rows.
    """
    # Seconds to import, for those who compile alone, here and below.
    from torch._dynamo.source import ConstantSource  # noqa: PLC0415
    from torch._subclasses import FakeTensorMode  # noqa: PLC0415
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext  # noqa: PLC0415

    def traced(*tensors: Tensor) -> object:
        with TracedOps():
            return work(*tensors)

    shapes = ShapeEnv()
    fakes = FakeTensorMode(shape_env=shapes)
    dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    counted = fakes.from_tensor(torch.empty(USUAL_ROWS), symbolic_context=dynamic, source=ConstantSource("rows"))
    num_rows = counted.shape[0]
    with fakes:
        sizes = [t.shape if is_fixed else (num_rows, *t.shape[1:]) for t, is_fixed in zip(tensors, fixed, strict=True)]
        examples = [
            torch.empty_strided(size, tensor.stride(), dtype=tensor.dtype)
            for tensor, size in zip(tensors, sizes, strict=True)
        ]
        graph = make_fx(traced, _allow_non_fake_inputs=True)(*examples)
    # What Inductor keeps on disk forgets some of the guards.
    compiled = _made_by_inductor(graph, examples, fx_graph_cache=False)
    return work if shapes.guards else compiled


def _compile(graph: fx.GraphModule, operands: Sequence[Tensor]) -> Compiled:
    from torch._subclasses import FakeTensorMode  # noqa: PLC0415
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415

    # Inductor keeps what it has made on disk, but not without an environment of shapes, even where none is symbolic.
    shapes = FakeTensorMode(shape_env=ShapeEnv())
    return _made_by_inductor(graph, [shapes.from_tensor(operand, static_shapes=True) for operand in operands])


def _made_by_inductor(graph: fx.GraphModule, examples: list[Any], **options: Any) -> Compiled:
    import torch._inductor as inductor  # noqa: PLC0415

    # Loops are shared out when they are made, so what was made for other threads must not be taken from the disk.
    options["cpp.threads"] = torch.get_num_threads()
    compiled: Compiled = inductor.compile(graph, examples, options=options)
    return compiled
