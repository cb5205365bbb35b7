"""The kernel calls of compiled work, written down with their buffers, and repeated without the wrapper around them.

In a decode step, weights drive the wrapper's Python out of the caches before it is called again: it takes a fifth of
the step (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Kernel = Callable[..., None]
Compiled = Callable[..., object]

# The names that Inductor's wrapper may use beside kernels and dtypes: they make buffers and aliases, which the tape
# keeps, or take the operands out of their list.
_BESIDE_KERNELS = {"empty_strided_cpu", "reinterpret_tensor", "torch", "clear"}


class Bound(NamedTuple):
    """The calls of a tape, with certain operands filled in."""

    tape: Tape
    calls: list[tuple[Kernel, list[Any]]]

    def play(self) -> None:
        """Does the work again."""
        for kernel, args in self.calls:
            kernel(*args)


class Tape:
    """The kernel calls of some work on operands, for one ``number`` only, as that determines the sizes of buffers."""

    def __init__(
        self, calls: Sequence[tuple[Kernel, Sequence[Any]]], operands: Sequence[Tensor], number: tuple[int, ...]
    ) -> None:
        self.number = number
        places = {id(operand): place for place, operand in enumerate(operands)}
        # An argument without a place among the operands is a buffer, or the number.
        self._calls = [(kernel, [(places.get(id(arg)), arg) for arg in args]) for kernel, args in calls]

    def bound(self, operands: Sequence[Tensor]) -> Bound:
        """The same work on other operands."""
        calls = [
            (kernel, [arg if place is None else operands[place] for place, arg in args]) for kernel, args in self._calls
        ]
        return Bound(self, calls)


class Code(Protocol):
    """Compiled work, with access to the wrapper that Inductor has made."""

    def __call__(self, *operands: object) -> object:
        """Does the work."""
        ...

    def wrapper(self, operands: Sequence[object]) -> Callable[..., Any] | None:
        """Does the work; returns Inductor's wrapper if that is given just these ``operands``, as one list."""
        ...


class TapedCode:
    """Compiled work that several recordings share, and its tape for the number that came last."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._wrapper: Callable[..., Any] | None = None
        self._untried = True
        self.tape: Tape | None = None

    def __call__(self, *operands: object) -> object:
        """Does the work, without the tape."""
        return self._code(*operands)

    def replayed(self, operands: Sequence[Tensor], number: tuple[int, ...]) -> Bound | None:
        """Does the work; returns the bound tape that repeats it, or None if there is none yet, or cannot be."""
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
            wrapper = self._code.wrapper([*operands, *number])
            self._wrapper = wrapper if calls_kernels_alone(wrapper) else None
        else:
            self._code(*operands, *number)
        return None


def calls_kernels_alone(wrapper: object) -> bool:
    """Whether Inductor's ``wrapper`` names kernels, what makes their buffers, and nothing that may do other work."""
    function = wrapper.__func__ if isinstance(wrapper, MethodType) else wrapper
    if not isinstance(function, FunctionType) or function.__closure__:
        return False
    names = set(function.__code__.co_names)
    kernels = set(filter(_is_kernel, names))
    dtypes = {name for name in names if isinstance(getattr(torch, name, None), torch.dtype)}
    return bool(kernels) and names <= kernels | dtypes | _BESIDE_KERNELS


def write_down(wrapper: Callable[..., Any], operands: Sequence[Tensor], number: tuple[int, ...]) -> Tape | None:
    """Does the work of a ``wrapper`` that only calls kernels, and gives the tape of the calls.

    Gives None if a kernel is given a part of an operand: the tape could not find that part in other operands.
    """
    calls: list[tuple[Kernel, Sequence[Any]]] = []

    def noted(kernel: Kernel) -> Kernel:
        def call(*args: Any) -> None:
            calls.append((kernel, args))
            kernel(*args)

        return call

    function: Any = wrapper.__func__ if isinstance(wrapper, MethodType) else wrapper
    kernels = {name: noted(function.__globals__[name]) for name in function.__code__.co_names if _is_kernel(name)}
    noting: Any = FunctionType(function.__code__, {**function.__globals__, **kernels})
    if isinstance(wrapper, MethodType):
        noting = MethodType(noting, wrapper.__self__)
    noting([*operands, *number])
    return None if _parts_of(operands, calls) else Tape(calls, operands, number)


def _is_kernel(name: str) -> bool:
    return name.startswith("cpp_")


def _parts_of(operands: Sequence[Tensor], calls: Sequence[tuple[Kernel, Sequence[Any]]]) -> bool:
    """Whether a kernel has been given a view of an operand's memory instead of the operand."""
    whole = {id(operand) for operand in operands}
    memory = {operand.untyped_storage().data_ptr() for operand in operands}
    args = [arg for _, args in calls for arg in args if isinstance(arg, Tensor) and id(arg) not in whole]
    return any(arg.untyped_storage().data_ptr() in memory for arg in args)
