"""Recordings for a CPU: work is traced once and compiled by Inductor, PyTorch's compiler, to a few fused loops."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic

import torch
from torch import Tensor

from duoserve.errors import CompilerError
from duoserve.kernels.compiled.tape import Bound, Compiled, TapedCode
from duoserve.kernels.recorder import Recorder, Result


class CompiledRecording(Generic[Result]):
    """Compiled work, and the memory that it reads and writes."""

    def __init__(self, compiled: Compiled, operands: Sequence[Tensor], result: Result) -> None:
        self.compiled = compiled
        self.operands = operands
        self.result = result

    def replay(self, *number: int) -> None:
        """As in Recording, but the work is done on return. ``number`` is what work of ``record_for`` takes."""
        self.compiled(*self.operands, *number)

    def on(self, others: Mapping[Tensor, Tensor]) -> CompiledRecording[Result]:
        """The same work on other memory: each operand that is a key of ``others`` is replaced by the tensor there.

        That tensor must have the operand's dtype, shape and strides.
        """
        operands = [others.get(operand, operand) for operand in self.operands]
        return type(self)(self.compiled, operands, self.result)


class TapedRecording(CompiledRecording[Result]):
    """A CompiledRecording of ``TapedCode``."""

    compiled: TapedCode

    def __init__(self, compiled: TapedCode, operands: Sequence[Tensor], result: Result) -> None:
        super().__init__(compiled, operands, result)
        self._bound: Bound | None = None

    def replay(self, *number: int) -> None:
        bound = self._bound
        if bound is not None and bound.tape is self.compiled.tape and bound.tape.number == number:
            bound.play()
        else:
            self._bound = self.compiled.replayed(self.operands, number)


class CpuCompiler(Recorder):
    """Compiles work once if it differs only in the tensors that it reads and writes, as layers do.

    With ``taped`` the calls of kernels are written down and repeated, see ``tape.py``. That keeps their buffers, so it
    is for work that is replayed often.
    """

    device = torch.device("cpu")

    def __init__(self, taped: bool = False) -> None:
        self._taped = taped
        self._compiled: dict[object, Compiled | None] = {}

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    @torch.no_grad()
    def record(self, work: Callable[[], Result]) -> CompiledRecording[Result]:
        """As in Recorder: the first run makes the tensors of the result, which replays fill.

        The result may be a tensor or tuples of tensors. Other tensors that ``work`` makes exist only while it runs.
        """
        recording = self._recorded(work, work(), range(0))
        assert recording is not None
        return recording

    @torch.no_grad()
    def record_for(self, work: Callable[[int], Result], numbers: range) -> CompiledRecording[Result]:
        """As ``record``, for work that takes a number, which each replay picks from ``numbers``.

        It may be run with the largest instead, so a larger number must not change the result. ``numbers`` has one
        number, or several from 2 on.
        """
        largest = numbers[-1]
        recording = self._recorded(work, work(largest), numbers) if len(numbers) > 1 else None
        if recording is not None:
            return recording
        of_largest = self.record(partial(work, largest))
        return CompiledRecording(
            lambda *operands: of_largest.compiled(*operands[:-1]), of_largest.operands, of_largest.result
        )

    def _recorded(
        self, work: Callable[..., Result], result: Result, numbers: range
    ) -> CompiledRecording[Result] | None:
        with loading_compiler():
            from duoserve.kernels.compiled import inductor  # noqa: PLC0415 - takes a second

        traced = inductor.trace(work, result, numbers)
        key = traced.key  # compiling may change the graph
        if key not in self._compiled:
            code = traced.compiled()
            self._compiled[key] = TapedCode(code) if code is not None and self._taped else code
        compiled = self._compiled[key]
        if isinstance(compiled, TapedCode):
            return TapedRecording(compiled, traced.operands, result)
        return None if compiled is None else CompiledRecording(compiled, traced.operands, result)

    def wait(self) -> None:
        """As in Recorder: nothing is under way."""


@contextmanager
def loading_compiler() -> Iterator[None]:
    """For a block that imports ``inductor``: raises CompilerError if that fails.

    It does where, for one, there is no place for temporary files.
    """
    try:
        yield
    except Exception as error:  # any kind is possible: importing PyTorch's compiler asks the system for much
        raise CompilerError(f"PyTorch's compiler cannot be loaded ({type(error).__name__}: {error})") from error


def cpp_compiler() -> str:
    """The C++ compiler that Inductor calls: ``CXX``, or the usual one of this system."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def can_compile() -> bool:
    """Whether ``cpp_compiler`` is installed."""
    return shutil.which(cpp_compiler()) is not None
