"""Work on many blocks of few shapes, as loops that PyTorch's compiler makes once for each shape."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.kernels.compiled.compiler import CompiledRecording, CpuCompiler

Work = Callable[..., None]


class CompiledLoops:
    """Calls of work on tensors. One at a time, from any thread: each takes all threads that PyTorch has."""

    def __init__(self) -> None:
        self._compiler = CpuCompiler()
        self._made: dict[object, _Made] = {}
        self._turn = threading.Lock()

    def __call__(self, work: Work, *tensors: Tensor) -> None:
        """``work(*tensors)``, which writes what it makes into some of them and reads no value on the host.

        It is compiled when it first meets tensors of such dtypes, shapes and strides. To be found again it must be
        equal to what it was: a function, or an object that is compared by its values.
        """
        with self._turn:
            made = self._prepared(work, tensors)
            made.recording.on(dict(zip(made.tensors, tensors, strict=True))).replay()

    def prepare(self, work: Work, *tensors: Tensor) -> None:
        """Compiles what a call with tensors like these would wait for; their values are left alone."""
        with self._turn:
            self._prepared(work, tensors)

    def _prepared(self, work: Work, tensors: tuple[Tensor, ...]) -> _Made:
        key = work, tuple((tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)
        if key not in self._made:
            # Of zeros, which are indices too: the tensors that there are would be held as long as what they made.
            zeros = tuple(
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).zero_() for t in tensors
            )
            self._made[key] = _Made(zeros, self._compiler.record(partial(work, *zeros)))
        return self._made[key]


class _Made(NamedTuple):
    tensors: tuple[Tensor, ...]
    recording: CompiledRecording[None]
