"""The kernel calls of compiled work, written down with their buffers, and repeated without the wrapper around them.

In a decode step weights have driven the wrapper's Python out of the caches by the time it is called again: it takes a
fifth of the step (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Kernel = Callable[..., None]
Compiled = Callable[..., object]

# What Inductor's wrapper may call beside kernels: they make buffers and aliases, which are kept.
_MAKES_BUFFERS = {"empty_strided_cpu", "reinterpret_tensor"}
_KERNELS = "cpp_"


class Bound(NamedTuple):
    """The calls of a tape on certain operands."""

    tape: Tape
    calls: list[tuple[Kernel, list[Any]]]

    def play(self) -> None:
        """Does the work again."""
        for kernel, args in self.calls:
            kernel(*args)


class Tape:
    """Of work on operands, and maybe on a number, which it is only good for: buffers are as large as that says."""

    def __init__(
        self, calls: Sequence[tuple[Kernel, Sequence[Any]]], operands: Sequence[Tensor], number: tuple[int, ...]
    ) -> None:
        self.number = number
        places = {id(operand): place for place, operand in enumerate(operands)}
        # Where an argument is no operand's place, it is a buffer, or the number.
        self._calls = [(kernel, [(places.get(id(arg)), arg) for arg in args]) for kernel, args in calls]

    def bound(self, operands: Sequence[Tensor]) -> Bound:
        """The same work on other operands."""
        calls = [
            (kernel, [arg if place is None else operands[place] for place, arg in args]) for kernel, args in self._calls
        ]
        return Bound(self, calls)


class Code(Protocol):
    """Compiled work as Inductor hands it out."""

    def __call__(self, *operands: object) -> object:
        """Does the work."""
        ...

    def wrapper(self, operands: Sequence[object]) -> Callable[..., Any] | None:
        """Does the work; returns Inductor's wrapper if it takes a list of these ``operands``, as they are."""
        ...


class TapedCode:
    """Work that several recordings share, and its tape, of the number that came last."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._wrapper: Callable[..., Any] | None = None
        self._untried = True
        self.tape: Tape | None = None

    def __call__(self, *operands: object) -> object:
        """Does the work, without the tape."""
        return self._code(*operands)

    def replayed(self, operands: Sequence[Tensor], number: tuple[int, ...]) -> Bound | None:
        """Does the work, and returns how it is done again, if it can be."""
        if self.tape is not None and self.tape.number == number:
            bound = self.tape.bound(operands)
            bound.play()
            return bound
        if self._wrapper is not None:
            self.tape = write_down(self._wrapper, operands, number)
            if self.tape is None:
                self._wrapper = None
        elif self._untried:
            self._untried = False
            self._wrapper = self._code.wrapper([*operands, *number])
        else:
            self._code(*operands, *number)
        return None


def write_down(wrapper: Callable[..., Any], operands: Sequence[Tensor], number: tuple[int, ...]) -> Tape | None:
    """Does the work of Inductor's ``wrapper`` of kernels on ``operands``; None if it is more than calls of kernels.

    So it is where it calls an op, and where a kernel is given a part of an operand.
    """
    calls: list[tuple[Kernel, Sequence[Any]]] = []

    def noted(kernel: Kernel) -> Kernel:
        def call(*args: Any) -> None:
            calls.append((kernel, args))
            kernel(*args)

        return call

    function, names = _function(wrapper), _called(wrapper)
    kernels = {name: noted(function.__globals__[name]) for name in names if name.startswith(_KERNELS)}
    spied = FunctionType(
        function.__code__,
        {**function.__globals__, **kernels},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    with _Ops() as ops:
        inputs = [*operands, *number]
        MethodType(spied, wrapper.__self__)(inputs) if isinstance(wrapper, MethodType) else spied(inputs)
    if ops.called or not names <= kernels.keys() | _MAKES_BUFFERS or _parts_of(operands, calls):
        return None
    return Tape(calls, operands, number)


class _Ops(TorchDispatchMode):
    """Notes whether an op is called."""

    called = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called = True
        return func(*args, **(kwargs or {}))


def _function(wrapper: Callable[..., Any]) -> FunctionType:
    function = wrapper.__func__ if isinstance(wrapper, MethodType) else wrapper
    assert isinstance(function, FunctionType)
    return function


def _called(wrapper: Callable[..., Any]) -> set[str]:
    """The functions of its module that it names."""
    function = _function(wrapper)
    return {name for name in function.__code__.co_names if callable(function.__globals__.get(name))}


def _parts_of(operands: Sequence[Tensor], calls: Sequence[tuple[Kernel, Sequence[Any]]]) -> bool:
    """Whether a kernel has been given memory of an operand under another shape."""
    whole = {id(operand) for operand in operands}
    memory = {operand.untyped_storage().data_ptr() for operand in operands}
    args = [arg for _, args in calls for arg in args if isinstance(arg, Tensor) and id(arg) not in whole]
    return any(arg.untyped_storage().data_ptr() in memory for arg in args)
