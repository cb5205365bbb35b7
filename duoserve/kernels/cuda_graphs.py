"""Recordings as CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Generic
from weakref import WeakSet

import torch
from torch import Tensor

from duoserve.kernels.recorder import Recorder, Recording, Result

# PyTorch allows one capture at a time in a process, whatever the mode of its errors; workspaces of cuBLAS and the
# garbage collector are the process's too.
_ONE_CAPTURE = Lock()


class CudaRecording(Recording[Result], Generic[Result]):
    """A graph, and the tensors that it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Result) -> None:
        self._graph = graph
        self._result = result

    @property
    def result(self) -> Result:
        return self._result

    def replay(self) -> None:
        """As in Recording, on the current stream."""
        self._graph.replay()


class CudaRecorder(Recorder):
    """Records graphs in one pool of memory: they are replayed one after another on the current stream, never at once.

    A pool ends with its last graph and takes no other after that: the graph that follows gets a new pool. The
    workspace of cuBLAS that a graph writes to lies in the pool too: see ``_own_workspaces``.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream = torch.cuda.Stream(device)

    @property
    def device(self) -> torch.device:
        return self._device

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As in Recorder: pinned."""
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self, work: Callable[[], Result]) -> Recording[Result]:
        """As in Recorder. The run before the capture compiles kernels and lets libraries set themselves up.

        Raises what ``work`` raises; later recordings are not affected.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                work()
                try:
                    result = self._capture(graph, work)
                except BaseException:
                    self._graphs.clear()  # the next graph starts a new pool
                    raise
        finally:  # also on an error: memory that the first run reads may soon be freed and used for something else
            current.wait_stream(self._stream)
        self._graphs.add(graph)
        return CudaRecording(graph, result)

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Result]) -> Result:
        others = list(self._graphs)  # keeps the graphs alive, so that the pool does not end before this one is in it
        pool = others[0].pool() if others else torch.cuda.graph_pool_handle()
        with _ONE_CAPTURE, _own_workspaces(), _nothing_collected(), released_on_error(pool):
            torch.cuda.empty_cache()  # cached memory, also of the first run, cannot be released during a capture
            # Copy threads go on calling CUDA meanwhile, which the default mode would treat as an error of the capture.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # says only that the capture is invalid; the error of ``work`` says why
                    graph.capture_end()
                raise
            graph.capture_end()
        return result

    def wait(self) -> None:
        """As in Recorder; releases the GIL."""
        torch.cuda.current_stream(self._device).synchronize()


@contextmanager
def released_on_error(pool: tuple[int, int]) -> Iterator[None]:
    """After an error inside, no capture is under way that takes memory from ``pool``, and none keeps it.

    Otherwise PyTorch before 2.12 goes on as if one were, where CUDA finds the capture invalid, and then frees no cached
    memory for those who ask for more (mended by its pull request 180395).
    """
    try:
        yield
    except BaseException:
        if torch.__version__ < "2.12":
            with suppress(RuntimeError):  # the capture has ended, and its graph releases the pool
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """A graph that is captured inside has workspaces of cuBLAS in its own pool, as PyTorch's cudagraph_trees has them.

    Otherwise it would write to that of the stream, which lives until any graph of the stream is dropped (PyTorch's
    issue 193402) and is then somebody else's memory. Whoever calls cuBLAS next gets a new one: all are let go.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage is collected inside: to free a graph, or registered memory, would end a capture with an error."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
