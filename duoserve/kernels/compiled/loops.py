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
    """Calls work on tensors as compiled loops, one call at a time: each uses all of PyTorch's threads. Any thread."""

    def __init__(self) -> None:
        self._compiler = CpuCompiler()
        self._made: dict[object, _Made] = {}
        self._turn = threading.Lock()

    def __call__(self, work: Work, *tensors: Tensor) -> None:
        """``work(*tensors)``, which writes its results into some of the tensors and reads no value on the host.

        It is compiled when it first meets tensors of these dtypes, shapes and strides. ``work`` is found again by
        equality: it must be a function, or an object that is compared by its values.
        """
        with self._turn:
            made = self._prepared(work, tensors)
            made.recording.on(dict(zip(made.tensors, tensors, strict=True))).replay()

    def prepare(self, work: Work, *tensors: Tensor) -> None:
        """Compiles now what a call with tensors like these would wait for; does not change the tensors."""
        with self._turn:
            self._prepared(work, tensors)

    def _prepared(self, work: Work, tensors: tuple[Tensor, ...]) -> _Made:
        key = work, tuple((tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)
        if key not in self._made:
            # Not the caller's tensors, which the recording would keep alive; zeros, as some tensors may be indices.
            zeros = tuple(
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).zero_() for t in tensors
            )
            self._made[key] = _Made(zeros, self._compiler.record(partial(work, *zeros)))
        return self._made[key]


class _Made(NamedTuple):
    tensors: tuple[Tensor, ...]
    recording: CompiledRecording[None]
