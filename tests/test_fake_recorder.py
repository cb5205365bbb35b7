"""The device that stands in for CUDA graphs: it replays what was launched, and refuses what a capture cannot hold."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from duoserve import kernels
from duoserve.kernels import DeviceWork
from tests.helpers.fake_recorder import FakeRecorder, IllegalCaptureError
from tests.helpers.fake_streams import FakeStreams


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder(FakeStreams(random.Random(0)))


ILLEGAL: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "int": lambda x: int(x[0]),
    "if": lambda x: bool(x[0] > 0),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "a mask that is written": lambda x: x.__setitem__(x > 0, 1.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
    "equal": lambda x: torch.equal(x, x),
    "an index from the host": lambda x: x[[0, 1]],
    "numbers from the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "the rows of a plan": lambda x: kernels.route_plan(x[None].long(), x.int()).num_rows(),
}


@pytest.mark.parametrize("work", ILLEGAL.values(), ids=ILLEGAL)
def test_what_needs_the_host_is_refused(recorder: FakeRecorder, work: Callable[[Tensor], object]) -> None:
    x = torch.tensor([1.0, 2.0, 0.0])
    with pytest.raises(IllegalCaptureError):
        recorder.record(lambda: work(x))


def test_a_replay_reads_memory_anew_and_the_host_not_at_all(recorder: FakeRecorder) -> None:
    x, factor = torch.ones(3), [2.0]
    recording = recorder.record(lambda: (x * factor[0]).cumsum(0)[1:])
    assert recording.result.isnan().all(), "nothing has run yet"
    x.fill_(5.0)
    factor[0] = 100.0
    recording.replay()
    assert recording.result.isnan().all(), "the device lags behind"
    recorder.wait()
    assert recording.result.tolist() == [20.0, 30.0]


def test_our_kernels_are_launched_as_a_whole_and_read_the_devices_lists(recorder: FakeRecorder) -> None:
    ids_TK, slots_E = torch.tensor([[0, 1]]), torch.tensor([4, -1, 5], dtype=torch.int32)
    recording = recorder.record(lambda: kernels.route_plan(ids_TK, slots_E))
    ids_TK.copy_(torch.tensor([[2, 1]]))
    recording.replay()
    recorder.wait()
    plan = recording.result
    assert isinstance(plan.resident, DeviceWork)
    assert (plan.resident.pairs(), plan.missing.pairs()) == ([(2, 5)], [(1, -1)])
