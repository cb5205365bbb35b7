"""Traces work as a graph, of which Inductor, PyTorch's compiler, makes loops. Importing this file takes a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from duoserve.errors import CompilerError
from duoserve.kernels.compiled.decomposed import DECOMPOSED
from duoserve.kernels.compiled.tape import Compiled
from duoserve.kernels.compiled.traced import TracedOps

# The number of rows that Inductor assumes when it chooses how to make loops: those of few rows use one thread only.
USUAL_ROWS = 1024


class Traced(NamedTuple):
    """A graph that takes ``operands`` and, unless ``numbers`` is empty, one of ``numbers`` behind them."""

    graph: fx.GraphModule
    operands: list[Tensor]
    numbers: range
    examples: list[Tensor | SymInt]
    shapes: ShapeEnv
    fakes: FakeTensorMode

    @property
    def key(self) -> object:
        """Equal for graphs that compile to the same code."""
        return self.graph.code, self.numbers, tuple((o.dtype, o.shape, o.stride()) for o in self.operands)

    def compiled(self) -> InductorCode | None:
        """The compiled loops; None if other numbers would need other loops."""
        with self.fakes:
            graph = make_fx(self.graph, DECOMPOSED, _allow_non_fake_inputs=True)(*self.examples)
        compiled = _made_by_inductor(graph, self.examples)
        return None if self.shapes.guards else compiled


def trace(work: Callable[..., object], result: object, numbers: range) -> Traced:
    """The graph of ``work``, which writes what ``work`` returns into the tensors of ``result`` at its end.

    ``work`` takes one of ``numbers``, or nothing if there are none.
    """
    targets = pytree.tree_leaves(result)

    def into_result(*number: int) -> None:
        with TracedOps():
            values = pytree.tree_leaves(work(*number))
        for target, value in zip(targets, values, strict=True):
            if isinstance(target, Tensor) and value is not target:
                target.copy_(value)

    # Inductor keeps compiled code on disk only if there is a ShapeEnv, even where no shape is symbolic.
    shapes = ShapeEnv()
    fakes = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    number = [_any_of(numbers, (numbers[0] + numbers[-1]) // 2, shapes)] if numbers else []
    with fakes:
        graph, operands = _lift(make_fx(into_result, _allow_non_fake_inputs=True)(*number))
    examples = [fakes.from_tensor(operand, static_shapes=True) for operand in operands]
    return Traced(graph, operands, numbers, [*examples, *number], shapes, fakes)


def _any_of(numbers: range, usual: int, shapes: ShapeEnv) -> SymInt:
    """A symbol for any of ``numbers``. As an input it lets Inductor keep code and guards on the number on disk."""
    source = ConstantSource("number")
    symbol = shapes.create_symbol(usual, source, DimDynamic.DYNAMIC)
    shapes.constrain_symbol_range(symbol, numbers[0], numbers[-1])
    number = shapes.create_symintnode(symbol, hint=usual, source=source)
    assert isinstance(number, SymInt)
    return number


def _lift(traced: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph with the tensors that it holds turned into its first inputs, and these tensors."""
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
    """``work`` of tensors like ``tensors``, compiled for any number of rows from two on.

    The rows are the first dimension of the tensors that are not ``fixed``. All other dimensions, strides and dtypes
    stay as they are here; values do not matter. Gives ``work`` itself if other numbers of rows would need other code.
    """

    def traced(_: int, *tensors: Tensor) -> object:
        with TracedOps():
            return work(*tensors)

    shapes = ShapeEnv()
    num_rows = _any_of(range(2, sys.maxsize), USUAL_ROWS, shapes)
    with FakeTensorMode(shape_env=shapes):
        sizes = [t.shape if is_fixed else (num_rows, *t.shape[1:]) for t, is_fixed in zip(tensors, fixed, strict=True)]
        examples = [
            torch.empty_strided(size, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            for tensor, size in zip(tensors, sizes, strict=True)
        ]
        graph = make_fx(traced, _allow_non_fake_inputs=True)(num_rows, *examples)
    compiled = _made_by_inductor(graph, [num_rows, *examples])
    with_rows = fixed.index(False)
    return work if shapes.guards else lambda *tensors: compiled(len(tensors[with_rows]), *tensors)


class InductorCode:
    """Code that Inductor has made: kernels, a wrapper that calls them, and AOTAutograd's work around that."""

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Tensor | SymInt], options: dict[str, Any]) -> None:
        self._inner: Any = None
        self._inputs: list[object] | None = None  # what the wrapper was given last; noted only while it is a list
        keep: Any = self._keep
        # AOTAutograd's cache would bypass inner_compile. Inductor's own cache keeps the code all the same.
        with functorch_config.patch(enable_autograd_cache=False):
            self._outer: Any = compile_fx(graph, list(examples), inner_compile=keep, config_patches=options)

    def __call__(self, *operands: object) -> object:
        """Does the work on these operands."""
        return self._outer(*operands)

    def wrapper(self, operands: Sequence[object]) -> Callable[..., object] | None:
        """Does the work; returns the wrapper if it is given just these ``operands``, as one list."""
        self._inputs = []
        self(*operands)
        given, self._inputs = self._inputs, None
        alike = len(given) == len(operands) and all(map(_same, given, operands))
        return self._inner.current_callable if alike else None

    def _keep(self, *args: Any, **kwargs: Any) -> Callable[[list[object]], object]:
        self._inner = inner = compile_fx_inner(*args, **kwargs)

        def call(inputs: list[object]) -> object:
            if self._inputs is not None:
                self._inputs = list(inputs)
            return inner(inputs)

        vars(call)["_boxed_call"] = True  # says that it takes one list, as ``inner`` does
        return call


def _same(one: object, other: object) -> bool:
    return one is other or (isinstance(other, int) and one == other)


def _made_by_inductor(graph: fx.GraphModule, examples: Sequence[Tensor | SymInt]) -> InductorCode:
    """The graph compiled by Inductor; raises CompilerError if that fails."""
    try:
        with torch.device("cpu"):  # Inductor uses the default device, which the calling program may have changed
            return InductorCode(graph, examples, _options())
    except (RuntimeError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise CompilerError(next((line for line in lines if "error:" in line), lines[0])) from error


def _options() -> dict[str, Any]:
    """Options for Inductor, which are also part of the key under which it keeps code on disk.

    Loops are made for a number of threads and a vector width: with others they would leave out elements, or write
    beyond a tensor's end. Checking the operands at each call would take three times as long as the rest of the call.
    A product and the sum that it goes into are one instruction, where there is one.
    """
    # pick_vec_isa picks the best instructions that this CPU has, and this width selects the same ones.
    width = pick_vec_isa().bit_width()
    return {
        "cpp.threads": torch.get_num_threads(),
        "cpp.simdlen": width,
        "cpp.enable_floating_point_contract_flag": "fast",
        "size_asserts": False,
    }
