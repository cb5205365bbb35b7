"""Recordings that fail or end: what is raised, and that the next one succeeds; on fake CUDA graphs, and on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from threading import Event, Thread
from unittest.mock import MagicMock

import pytest
import torch
from torch.torch_version import TorchVersion

from duoserve.kernels.cuda_graphs import CudaRecorder

DEVICE = torch.device("cuda", 0)
CLEAR = "_cuda_clearCublasWorkspaces"


class FakeGraph:
    """As PyTorch's: a capture in which something was raised is not valid, and a pool without graphs has ended.

    Before 2.12 PyTorch goes on as if a capture that is not valid were under way, and keeps its pool.
    """

    captures = True  # whether what is captured is valid
    cached = False  # whether memory that the device has is kept from others for the next who asks
    alive: dict[int, int]  # how many graphs each pool has
    under_way: set[int]  # the pools that captures take memory from
    calls: list[str]  # what was called, in order
    handle: int | None = None

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        self.calls.append("begin")
        if FakeGraph.cached:
            raise torch.OutOfMemoryError("what is cached cannot be released while a capture is under way")
        if self.alive.get(pool) == 0:
            raise RuntimeError("the pool has ended")
        self.handle = pool
        self.alive[pool] = self.alive.get(pool, 0) + 1
        self.under_way.add(pool)

    def capture_end(self) -> None:
        self.calls.append("end")
        pool = self.pool()
        if not self.captures:
            self.handle = None
            if torch.__version__ >= "2.12":
                end_allocating(0, pool)
                release_pool(0, pool)
            raise RuntimeError("invalid capture")
        end_allocating(0, pool)

    def __del__(self) -> None:
        if self.handle is not None:
            release_pool(0, self.handle)

    def pool(self) -> int:
        assert self.handle is not None
        return self.handle

    def replay(self) -> None:
        pass


def end_allocating(device: int, pool: int) -> None:
    if pool not in FakeGraph.under_way:
        raise RuntimeError("not currently recording")
    FakeGraph.under_way.remove(pool)


def release_pool(device: int, pool: int) -> None:
    FakeGraph.alive[pool] -= 1


def emptied() -> None:
    FakeGraph.calls.append("empty")
    FakeGraph.cached = False


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CudaRecorder:
    handles = count()
    monkeypatch.setattr(FakeGraph, "captures", True)
    monkeypatch.setattr(FakeGraph, "cached", False)
    monkeypatch.setattr(FakeGraph, "alive", {}, raising=False)
    monkeypatch.setattr(FakeGraph, "under_way", set(), raising=False)
    monkeypatch.setattr(FakeGraph, "calls", [], raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release_pool)
    monkeypatch.setattr(torch._C, CLEAR, lambda: FakeGraph.calls.append("clear"), raising=False)  # not in a CPU's torch
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    return CudaRecorder(DEVICE)


def failing_when_captured(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, *, valid: bool = False
) -> Callable[[], int]:
    """Work whose first run is a success; whether the capture of its second is ``valid`` nonetheless."""
    runs = count()

    def work() -> int:
        if next(runs) == 1:
            monkeypatch.setattr(FakeGraph, "captures", valid)
            if error is not None:
                raise error
        return 3

    return work


@pytest.mark.parametrize("recorded", [0, 2])
@pytest.mark.parametrize(("error", "said"), [(ValueError("why"), "why"), (None, "invalid capture")])
def test_what_fails_says_why_and_the_next_one_succeeds(
    recorder: CudaRecorder, recorded: int, error: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [recorder.record(lambda: 1) for _ in range(recorded)]
    with pytest.raises(type(error) if error else RuntimeError, match=said):
        recorder.record(failing_when_captured(monkeypatch, error))
    monkeypatch.setattr(FakeGraph, "captures", True)
    kept += [recorder.record(lambda: 2) for _ in range(2)]
    assert [recording.result for recording in kept] == [1] * recorded + [2, 2]


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.0+cu130"])
@pytest.mark.parametrize("valid", [True, False])
def test_a_failed_capture_is_not_under_way_and_keeps_no_memory(
    recorder: CudaRecorder, version: str, valid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    kept = recorder.record(lambda: 1)
    with pytest.raises(ValueError, match="why"):
        recorder.record(failing_when_captured(monkeypatch, ValueError("why"), valid=valid))
    gc.collect()  # the error has the graph
    assert FakeGraph.under_way == set() and FakeGraph.alive == {0: 1}
    assert kept.result == 1


@pytest.mark.parametrize("failing_run", [0, 1])
def test_what_follows_a_failed_recording_comes_behind_its_first_run(recorder: CudaRecorder, failing_run: int) -> None:
    """That run may still read tensors which whoever gave the work drops now."""
    runs = count()

    def work() -> int:
        if next(runs) == failing_run:
            raise ValueError("why")
        return 3

    current, own = torch.cuda.current_stream(DEVICE), torch.cuda.Stream(DEVICE)
    with pytest.raises(ValueError, match="why"):
        recorder.record(work)
    assert [call.args for call in current.wait_stream.call_args_list] == [(own,)]


def test_a_capture_begins_with_the_memory_that_the_first_run_has_left_cached(
    recorder: CudaRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> int:
        monkeypatch.setattr(FakeGraph, "cached", True)
        return 3

    assert recorder.record(work).result == 3


def test_recordings_share_memory_until_the_last_is_dropped_and_one_can_follow(recorder: CudaRecorder) -> None:
    first, second = recorder.record(lambda: 1), recorder.record(lambda: 2)
    assert list(FakeGraph.alive.values()) == [2]
    del first
    third = recorder.record(lambda: 3)
    assert list(FakeGraph.alive.values()) == [2]
    del second, third
    assert recorder.record(lambda: 4).result == 4


def test_recordings_dropped_by_what_the_next_one_does_are_no_hindrance(recorder: CudaRecorder) -> None:
    kept = [recorder.record(lambda: 1)]
    assert recorder.record(kept.clear) is not None


@pytest.mark.parametrize("error", [None, ValueError("why")])
def test_nothing_is_collected_during_a_capture(recorder: CudaRecorder, error: Exception | None) -> None:
    """What frees another graph, or registered memory, would end it with an error of CUDA's."""
    collects: list[bool] = []

    def work() -> None:
        collects.append(gc.isenabled())
        if len(collects) == 2 and error:
            raise error

    with pytest.raises(ValueError, match="why") if error else nullcontext():
        recorder.record(work)
    assert collects == [True, False] and gc.isenabled()


def test_no_other_thread_captures_at_the_same_time(recorder: CudaRecorder) -> None:
    """It would begin to collect garbage when the first has ended, and let go of the workspaces of the other."""
    runs, first_run, captured = count(), Event(), Event()
    said = iter([first_run, captured])

    def work_beside() -> None:
        next(said).set()

    beside = Thread(target=CudaRecorder(DEVICE).record, args=(work_beside,))

    def work() -> bool:
        if next(runs) == 0:
            return False
        beside.start()
        assert first_run.wait(10.0)
        return captured.wait(0.2)

    together = recorder.record(work).result
    beside.join(10.0)
    assert not together and captured.is_set()


@pytest.mark.parametrize("error", [None, ValueError("why")])
def test_a_graph_has_no_workspace_that_its_stream_has_before_or_after(
    recorder: CudaRecorder, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream's is freed with any graph of the stream, and what the first run had is not kept beside the graph's."""
    if error is None:
        recorder.record(lambda: FakeGraph.calls.append("work"))
    else:
        with pytest.raises(ValueError, match="why"):
            recorder.record(failing_when_captured(monkeypatch, error))
    assert [call for call in FakeGraph.calls if call != "work"] == ["clear", "empty", "begin", "end", "clear"]


def test_pytorch_can_let_go_of_workspaces() -> None:
    """By a function of its own that a CPU's PyTorch declares, but has not."""
    assert f"def {CLEAR}() -> None" in Path(torch.__file__).with_name("_C").joinpath("__init__.pyi").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_product_recorded_on_a_gpu_outlives_another_recording() -> None:
    """Its workspace is not given to who comes next: neither reads the other's numbers."""
    recorder = CudaRecorder(DEVICE)
    x_MK, w_KN = (torch.randn(rows, 4096, device=DEVICE).bfloat16() for rows in (1, 4096))
    kept, dropped = (recorder.record(lambda: x_MK @ w_KN) for _ in range(2))
    kept.replay()
    recorder.wait()
    true_MN = kept.result.clone()
    del dropped
    gc.collect()
    torch.cuda.empty_cache()
    others = [torch.full((4 << 20,), float("nan"), device=DEVICE) for _ in range(4)]  # of 16 MiB each
    kept.replay()
    recorder.wait()
    assert torch.equal(kept.result, true_MN)
    assert all(bool(other.isnan().all()) for other in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_records_after_all_recordings_were_dropped() -> None:
    recorder, x = CudaRecorder(DEVICE), torch.ones(4, device=DEVICE)
    for factor in (2, 3, 4):
        recordings = [recorder.record(lambda factor=factor: x * factor + 1) for _ in range(2)]
        x.fill_(5.0)
        for recording in recordings:
            recording.replay()
            recorder.wait()
            assert recording.result.tolist() == [5.0 * factor + 1] * 4
        del recordings, recording


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_records_after_it_could_not() -> None:
    recorder, x = CudaRecorder(DEVICE), torch.ones(4, device=DEVICE)
    runs = count()

    def reads_the_device() -> float:
        if next(runs) == 0:
            return 0.0
        (x + 1).sum()
        return float(x.sum())

    with pytest.raises(RuntimeError, match="capturing"):
        recorder.record(reads_the_device)
    recording = recorder.record(lambda: x * 2)
    x.fill_(5.0)
    recording.replay()
    recorder.wait()
    assert recording.result.tolist() == [10.0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_records_what_fits_only_once() -> None:
    """The first run's memory stays cached: the capture must be able to have the same again."""
    recorder, large = CudaRecorder(DEVICE), 1 << 30

    def work() -> torch.Tensor:
        return torch.full((large,), 7, dtype=torch.uint8, device=DEVICE)[:4].clone()

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + 1.5 * large) / total, DEVICE)
    try:
        recording = recorder.record(work)
        recording.replay()
        recorder.wait()
        assert recording.result.tolist() == [7] * 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
