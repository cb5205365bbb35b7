"""A device that records, without a device: launches are noted while the work runs, and replayed when their turn comes.

No line of Python of the recorded work runs again in a replay, so that whatever it took from the host stays as it was;
and what a capture forbids is refused while recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from duoserve import kernels
from duoserve.experts.streams import Lane
from duoserve.kernels import DeviceWork, HostWork, RoutePlan
from duoserve.kernels.recorder import Recorder, Recording, Result
from tests.helpers.fake_streams import FakeStreams

KERNELS = {getattr(kernels, name) for name in kernels.__all__ if hasattr(getattr(kernels, name), "__wrapped__")}
# What reads the device's memory on the host, by the name of the method or function.
READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"}
READS |= {"cpu", "is_nonzero", "equal", "allclose", "to_dense", "__repr__"}
# What has a shape that depends on values, or brings numbers from the host.
SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
FROM_THE_HOST = {"lift_fresh", "_local_scalar_dense", "equal", "is_nonzero"}


class IllegalCaptureError(AssertionError):
    """The recorded work did what a CUDA graph cannot."""


class _Launch:
    """A call, with the memory that it had when it was recorded."""

    def __init__(self, call: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        self._call, self._args, self._kwargs, self.result = call, args, kwargs, result

    @property
    def name(self) -> str:
        return str(getattr(self._call, "__name__", self._call))

    def again(self) -> None:
        for old, new in zip(
            _tensors(self.result), _tensors(self._call(*_fresh(self._args), **_fresh(self._kwargs))), strict=True
        ):
            if old.shape != new.shape:
                raise IllegalCaptureError(f"{self._call} gave {tuple(old.shape)} when recorded, now {tuple(new.shape)}")
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def ruin(self) -> None:
        """Makes NaN, or what is no index, of what the call has given, unless that is a view of what it took."""
        taken = {_storage(tensor) for tensor in _tensors((self._args, self._kwargs))}
        for tensor in _tensors(self.result):
            if tensor.dtype is not torch.bool and _storage(tensor) not in taken:
                tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


class _Aten(TorchDispatchMode):
    """Notes every operation of PyTorch."""

    def __init__(self, tape: list[_Launch]) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SHAPED_BY_VALUES | FROM_THE_HOST:
            raise IllegalCaptureError(f"{func} needs the host")
        if name in ("index", "index_put", "index_put_") and _has_mask(args[1]):
            raise IllegalCaptureError(f"{func} by a mask has a shape that depends on values")
        result = func(*args, **(kwargs or {}))
        self._tape.append(_Launch(func, args, kwargs or {}, result))
        return result


class _Python(TorchFunctionMode):
    """Notes the launches of our kernels, each as a whole, and refuses what reads the device."""

    def __init__(self, tape: list[_Launch]) -> None:
        super().__init__()
        self._tape = tape
        self._aten = _Aten(tape)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KERNELS:
            result = _on_device(func(*_fresh(args), **_fresh(kwargs)))
            self._tape.append(_Launch(func, args, kwargs, result))
            return result
        name = getattr(func, "__name__", "")
        if name in READS:
            raise IllegalCaptureError(f"{name} reads the device")
        if name in ("__getitem__", "__setitem__") and any(isinstance(at, list) for at in _indices(args[1])):
            raise IllegalCaptureError("an index from the host")
        with self._aten:
            return func(*args, **kwargs)


class FakeRecording(Recording[Result], Generic[Result]):
    def __init__(self, streams: FakeStreams, tape: list[_Launch], result: Result) -> None:
        self._streams, self._tape, self._result = streams, tape, result

    @property
    def result(self) -> Result:
        return self._result

    def replay(self) -> None:
        self._streams.host_computes = False  # until somebody says that it does again
        for launch in self._tape:
            self._streams.run(_outside_modes(launch.again))


class FakeRecorder(Recorder):
    """Everything goes onto the compute lane of ``streams``, and happens there when it must."""

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self._recording = False
        self.num_recordings = 0
        self.launched: set[str] = set()  # what is in them, by name

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if self._recording:
            target.copy_(source)
        else:
            self._streams.run(_outside_modes(lambda: target.copy_(source)))

    def record(self, work: Callable[[], Result]) -> Recording[Result]:
        self.wait()  # what the work reads has been written
        tape: list[_Launch] = []
        with self._on_tape(), _Python(tape):
            result = work()
        for launch in tape:  # on a device it would not have run yet
            launch.ruin()
        self.num_recordings += 1
        self.launched.update(launch.name for launch in tape)
        return FakeRecording(self._streams, tape, result)

    def wait(self) -> None:
        self._streams.wait(self._streams.mark(Lane.COMPUTE))

    @contextmanager
    def _on_tape(self) -> Iterator[None]:
        self._recording = True
        try:
            yield
        finally:
            self._recording = False


def _outside_modes(work: Callable[[], Any]) -> Callable[[], None]:
    """``work`` in inference mode, as the engine runs it, whichever thread lets the device go on."""

    def run() -> None:
        with torch.inference_mode():
            work()

    return run


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, RoutePlan):
        works = (result.resident, result.missing)
        return [result.order_R, result.starts_E1, *(t for w in works for t in (w.experts_W, w.slots_W, w.count_1))]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _on_device(value: Any) -> Any:
    """Without what only the host of a CPU knows."""
    if isinstance(value, HostWork):
        return DeviceWork(value.experts_W, value.slots_W, value.count_1)
    if isinstance(value, RoutePlan):  # a new one, whose cached properties are still to be read
        return replace(value, resident=_on_device(value.resident), missing=_on_device(value.missing))
    return value


def _fresh(args: Any) -> Any:
    return tree_map(_on_device, args)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _indices(at: Any) -> tuple[Any, ...]:
    return at if isinstance(at, tuple) else (at,)
