"""Recorded steps of the serving bench without a device: what the host takes, bits in every mode, timelines."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.streams import Lane, Mark, Streams
from duoserve.kernels.recorder import Recorder, Recording
from duoserve.kv_cache import NewTokens
from duoserve.launching.launch import Launch
from duoserve.launching.recorded import RecordedRunner
from duoserve.metrics import Meter
from duoserve.passes import Passes
from serve import report as serve_report
from serve import run as serve_run
from serve.cells import AUTO, BASE, EVENT, GRAPH, Cell, shown
from serve.figures import figures, targets
from serve.host import CpuHost
from serve.steps import TimedRecorder, TimedRunner, host_seconds
from serve.worker import ServeBench
from tests.bench.test_bench_serve import CEILINGS, DEEPSEEK, MIXTRAL, QWEN3, part
from tests.helpers.fake_recorder import FakeRecorder
from tests.helpers.fake_streams import FakeStreams


class At(Mark):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Device(Streams, Recorder):
    """Replays take ``busy`` seconds of it and ``launch`` of the host, whatever else the host does takes ``call``."""

    def __init__(self, launch: float, busy: float, call: float) -> None:
        self.now = 0.0
        self.free = 0.0  # when the device has done what it was asked for
        self.launch, self.busy, self.call = launch, busy, call

    device = torch.device("cpu")

    def mark(self, lane: Lane) -> At:
        assert lane is Lane.COMPUTE
        self.now += self.call
        self.free = max(self.free, self.now)
        return At(self.free)

    def after(self, lane: Lane, mark: Mark) -> None:
        raise AssertionError("a lane had to wait, but there is one only")

    def copy(self, *operands: object) -> None:
        raise AssertionError("bytes were copied")

    def passed(self, mark: Mark) -> bool:
        assert isinstance(mark, At)
        return mark.seconds <= self.now

    def seconds(self, earlier: Mark, later: Mark) -> float:
        assert isinstance(earlier, At) and isinstance(later, At)
        return later.seconds - earlier.seconds

    def record(self, work: Any) -> Recording[Any]:
        return Replayed(self)

    def wait(self) -> None:
        self.now = max(self.now, self.free)


class Replayed(Recording[None]):
    def __init__(self, device: Device) -> None:
        self._device = device

    result = None

    def replay(self) -> None:
        device = self._device
        device.now += device.launch
        device.free = max(device.free, device.now) + device.busy


class Recorded(RecordedRunner):
    """A step of ``layers`` replays; the host thinks for ``thought`` seconds before each, and waits behind it or not."""

    def __init__(self, device: Device, recorder: TimedRecorder, layers: int, thought: float, waits: bool) -> None:
        self._device, self._recorder, self._waits, self._thought = device, recorder, waits, thought
        self._replays = [recorder.record(lambda: None) for _ in range(layers)]

    def __call__(self, new_tokens: NewTokens | None) -> Tensor:
        for replay in self._replays:
            self._device.now += self._thought
            replay.replay()
            if self._waits:
                self._recorder.wait()
        self._recorder.wait()
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("launch", "thought", "waits", "of_host"),
    [
        (5.0, 3.0, True, 4 * 8.0),  # the device waits for each thought and each launch
        (5.0, 3.0, False, 8.0),  # only for the first: later ones pass while it is busy
        (0.0, 0.0, True, 0.0),
    ],
)
def test_the_hosts_time_is_what_the_device_waits_for(
    launch: float, thought: float, waits: bool, of_host: float
) -> None:
    """Whatever it takes to take note of the times."""
    device = Device(launch, busy=100.0, call=2.0)
    recorder = TimedRecorder(device, device, lambda: device.now)
    runner = TimedRunner(Recorded(device, recorder, 4, thought, waits), recorder, lambda: device.now)
    new_tokens: Any = None
    runner(new_tokens)
    assert runner.times.steps == 0
    with runner.timing() as times:
        began = device.now
        for _ in range(3):
            runner(new_tokens)
            device.now += 50.0  # the engine chooses a token
    runner(new_tokens)
    assert times.steps == 3 and times.busy_s == pytest.approx(3 * 400)
    found = times.to_dict() | {"wall_s": device.now - began, "stall_s": 0.0}
    found["wall_s"] -= (
        4 * (thought + launch) + 400 if waits else thought + launch + 400
    )  # of the last, which is not timed
    whole, recorded = host_seconds(found)
    assert recorded == pytest.approx(of_host, abs=3.0) and whole == pytest.approx(of_host + 50, abs=3.0)


def test_what_the_device_waits_for_copies_is_not_the_hosts() -> None:
    times = {"steps": 2, "wall_s": 10.0, "recorded_s": 8.0, "busy_s": 4.0, "noting_s": 0.5, "aside_s": 1.0}
    assert host_seconds(times | {"stall_s": 0.0}) == (2.25, 1.75)
    assert host_seconds(times | {"stall_s": 1.5}) == (1.5, 1.0)


TIMED = {
    "steps": 8,
    "wall_s": 0.11,
    "recorded_s": 0.1,
    "busy_s": 0.08,
    "noting_s": 0.0,
    "aside_s": 0.008,
    "stall_s": 0.02,
}


def test_the_hosts_time_is_held_against_its_limits() -> None:
    """2 ms in 8 steps is 250 us a step, and 125 a layer of two."""
    name = f"{QWEN3}: the host's time, a"
    cells = [Cell(QWEN3, BASE, share, mode=mode) for mode in (EVENT, GRAPH) for share in ("25%", "45%")]
    fast = TIMED | {"wall_s": 0.1084}
    parts = [part(cell, launch=cell.mode, timed=fast if cell.share == "45%" else TIMED) for cell in cells]
    found = {target.name: target for target in targets(parts, CEILINGS)}
    layer, step = found[f"{name} layer in event mode"], found[f"{name} step in graph mode"]
    assert layer.value == pytest.approx(125) and step.value == pytest.approx(250)
    assert not layer.reached and not step.reached and "2 cells" in layer.detail
    found = {target.name: target for target in targets(parts[1::2], CEILINGS)}
    assert found[f"{name} layer in event mode"].reached and found[f"{name} step in graph mode"].reached
    untimed = {target.name: target for target in targets([part(cell, launch=cell.mode) for cell in cells], CEILINGS)}
    assert untimed[f"{name} layer in event mode"].value is untimed[f"{name} step in graph mode"].value is None


class CaughtUp(FakeRecorder):
    """Has the device do everything when it is waited for: behind that, the bench lets the host compute prompts."""

    def __init__(self, streams: FakeStreams) -> None:
        super().__init__(streams)
        self._lanes = streams

    def wait(self) -> None:
        self._lanes.finish()
        self._lanes.host_computes = True


class LaggingHost(CpuHost):
    """A GPU's ways on a CPU: copies on lanes, and decode steps that are recorded."""

    def __init__(self) -> None:
        self._streams = FakeStreams(random.Random(1), host_computes=True)

    def copy_engine(self, store: ExpertStore, pool: SlotPool, meter: Meter, piece_bytes: int) -> StreamCopyEngine:
        return StreamCopyEngine(
            store, pool, self._streams, piece_bytes=piece_bytes, on_copied=meter.copied, on_stalled=meter.stalled
        )

    def recorder(self) -> TimedRecorder:
        return TimedRecorder(CaughtUp(self._streams), self._streams)


@pytest.fixture(scope="module")
def plain() -> ServeBench:
    return ServeBench(is_tiny=True, arena_gib=0)


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServeBench]:
    monkeypatch.setattr(serve_run, "resolve_mode", lambda wanted, _: wanted)
    chosen = {AUTO: Launch.MODEL, EVENT: Launch.EVENT, GRAPH: Launch.GRAPH}
    monkeypatch.setattr(serve_run, "choose_launch", lambda wanted, *_: chosen[wanted])
    bench = ServeBench(is_tiny=True, arena_gib=0, host=LaggingHost())
    yield bench
    bench.close()


@pytest.mark.parametrize(("model", "batch"), [(MIXTRAL, 1), (MIXTRAL, 4), (DEEPSEEK, 1)])
@pytest.mark.parametrize("mode", [EVENT, GRAPH])
def test_recorded_steps_are_timed_and_have_the_models_bits(
    mode: str, model: str, batch: int, plain: ServeBench, lagging: ServeBench
) -> None:
    """No step is recorded while it is measured, and those that are timed are not among the figures."""
    by_model = plain.cell(**Cell(model, "on-demand", "15%", batch=batch).to_dict())
    measured = lagging.cell(**Cell(model, BASE, "25%", batch=batch, mode=mode).to_dict())
    assert by_model["launch"] == "model" and measured["launch"] == mode
    assert by_model["timed"] is None and measured["timed"]["steps"] == 2
    assert measured["timed"]["busy_s"] > 0 and measured["recorded_while_timed"] == 0
    for digest in ("logits", "decoded_logits"):
        assert measured[digest] == by_model[digest] != "not finite"
    assert measured["logits"] != measured["decoded_logits"] and measured["as_taped"] is not False
    stats = measured["stats"]
    assert measured["steps"] == 8 and stats["hits_decode"] + stats["misses_decode"] == measured["asked"]
    assert [len(tokens) for tokens in measured["tokens"]] == [8 + 2 + 1] * len(by_model["tokens"])
    assert figures(measured, CEILINGS)["host_s_per_step"] is not None


def test_decode_steps_of_other_bits_are_noticed(plain: ServeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the digest of the steps alone: the prompt's, and all tokens, are the same."""
    cell = Cell(MIXTRAL, BASE, "25%")
    true, decode = plain.cell(**cell.to_dict()), Passes.decode
    nearly_one = 1 + 2**-20
    monkeypatch.setattr(Passes, "decode", lambda passes, requests: decode(passes, requests) * nearly_one)
    wrong = plain.cell(**cell.to_dict())
    assert wrong["logits"] == true["logits"] and wrong["tokens"][0] == true["tokens"][0][: len(wrong["tokens"][0])]
    assert wrong["decoded_logits"] != true["decoded_logits"]


def test_the_bytes_that_a_prompt_needs_are_of_what_it_wants_and_has_not(plain: ServeBench) -> None:
    """Whatever is copied on top of that: a prompt of all experts resident needs none."""
    resident, ring, small = (
        plain.cell(**Cell(QWEN3, policy, share).to_dict())
        for policy, share in (("resident", "100%"), (BASE, "45%"), ("on-demand", "15%"))
    )
    assert resident["needed_bytes"] == 0 and ring["needed_bytes"] > 0
    for one in (ring, small):
        assert one["needed_bytes"] % one["slot_bytes"] == 0 and one["needed_bytes"] <= one["prefill"]["bytes_total"]
    assert small["needed_bytes"] == small["prefill"]["bytes_total"]  # it copies what was asked for, and nothing else
    assert ring["needed_bytes"] < small["needed_bytes"]


def test_a_step_of_each_mode_is_shown_as_a_timeline(
    lagging: ServeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, path = shown(MIXTRAL), tmp_path / "folder" / "steps.json.gz"
    found = lagging.timeline([cell.to_dict() for cell in cells])
    assert len(found["trace"]) < 200_000
    result = {"timeline": found | {"name": "both", "status": "measured"}}
    (tmp_path / "serve.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["serve_report.py", str(tmp_path / "serve.json"), "--timeline", str(path)])
    serve_report.main()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert len(events) == found["events"] and "both" in serve_report.timeline(result)
    assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in events)
    steps = {event["name"]: event for event in events if event["cat"] == "user_annotation"}
    assert [mode for name in steps for mode in (EVENT, GRAPH) if mode in name] == [EVENT, GRAPH]
    for step in steps.values():
        inside = [event for event in events if step["ts"] < event["ts"] < step["ts"] + step["dur"]]
        assert any("copy_" in event["name"] for event in inside)


def test_a_timeline_that_cannot_be_had_says_why(
    plain: ServeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plain.timeline([cell.to_dict() for cell in shown(MIXTRAL)])
    assert "takes CUDA graphs" in found["unavailable"]
    result = {"timeline": {"name": "both", "status": "not measured", "why": found["unavailable"]}}
    assert "both" in serve_report.timeline(result) and "takes CUDA graphs" in serve_report.timeline(result)
    (tmp_path / "serve.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["serve_report.py", str(tmp_path / "serve.json"), "--timeline", "none.json.gz"])
    with pytest.raises(SystemExit):
        serve_report.main()
