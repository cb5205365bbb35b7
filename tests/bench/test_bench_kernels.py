"""The kernel bench without a GPU: its arithmetic, its report, and its parts under the interpreter."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.torch_version import TorchVersion

import bench_kernels
from gpu import attention_ops, kernel_report, kernel_targets, kernel_worker, moe_paths, moe_shapes, small_ops
from gpu import timing as gpu_timing
from gpu.moe_operands import Pool
from harness import WorkerError
from tests.bench.conftest import Ran
from tests.kernels.common import DEVICE

NO_GPU = pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens without a GPU")

# Floors in us as published with the targets: decode of 1, 4 and 16 tokens, then prefill.
PUBLISHED_FLOORS = {
    ("Qwen3-30B-A3B", "bf16"): {1: 25, 4: 92, 16: 259, 32768: 3100},
    ("Qwen3-30B-A3B", "fp8"): {1: 12.6, 4: 46, 16: 130},
    ("Qwen3-30B-A3B", "int4"): {1: 6.5, 4: 24, 16: 67},
    ("Mixtral-8x7B", "bf16"): {1: 235, 4: 642, 16: 930, 8192: 7200},
    ("Mixtral-8x7B", "int4"): {1: 61, 4: 167, 16: 242, 8192: 7200},
    ("DeepSeek-V2-Lite", "bf16"): {1: 35, 4: 120, 16: 293},
}


def test_floors_are_the_published_ones() -> None:
    published = (case for case in moe_shapes.CASES if case.format != "bf12")
    cases = {(case.shape.name, case.format, case.tokens): case for case in published}
    asked = {(*key, tokens): floor for key, floors in PUBLISHED_FLOORS.items() for tokens, floor in floors.items()}
    assert cases.keys() == asked.keys()
    for key, floor in asked.items():
        assert cases[key].expected_floor_us(moe_shapes.H100) == pytest.approx(floor, rel=0.02), key


def test_targets_lie_above_their_floors() -> None:
    for case in moe_shapes.CASES:
        assert case.target_us is None or case.target_us > case.expected_floor_us(moe_shapes.H100), case.name


def test_even_routing_uses_as_many_experts_as_the_formula_says() -> None:
    shape = moe_shapes.MoEShape("any", 16, 8, 32, 3)
    torch.manual_seed(0)
    found = [len(torch.rand(5, 32).argsort(1)[:, :3].unique()) for _ in range(4000)]
    assert sum(found) / len(found) == pytest.approx(shape.mean_experts(5), rel=0.01)


@NO_GPU
def test_without_a_gpu_it_prints_the_roofline_and_measures_nothing(bench_result: Callable[..., Ran]) -> None:
    _, printed, result = bench_result("bench_kernels")
    assert "nothing was measured" in printed
    assert "moe-ops: not installed" in printed and "grouped-nf4-gemm: not installed" in printed
    table = printed.partition("| routed layer")[2].partition("\n\n")[0]
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    for case in moe_shapes.CASES:
        assert "not measured" in lines[case.name], lines[case.name]
    assert "| 25.17" in lines["Qwen3-30B-A3B bf16, 1 token"] and "| 31 " in lines["Qwen3-30B-A3B bf16, 1 token"]
    assert {part["status"] for part in result["parts"]} == {"not measured"}
    assert {target.verdict() for target in kernel_targets.targets(result)} == {"not measured"}


def summary(median: float) -> dict[str, float]:
    return {"median": median, "low": median * 0.9, "high": median * 1.1}


def measured_row(what: str, us: float, **more: Any) -> dict[str, Any]:
    return {"what": what, "us": summary(us), "nbytes": 0, "flop": 0, "peers": {}, "failed": {}} | more


def measured_part(section: str, name: str, *rows: dict[str, Any]) -> dict[str, Any]:
    fine = {"status": "measured", "error": None, "checks": [], "errors": []}
    return {"section": section, "name": name, "rows": list(rows)} | fine


def measured_result(gpu: str, *parts: dict[str, Any]) -> dict[str, Any]:
    facts = {"name": gpu, "capability": "9.0", "multiprocessors": 132, "memory_bytes": 80 << 30, "l2_bytes": 50 << 20}
    ceilings = {"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 8e14, "link_bytes_per_s": 5e10, "empty_kernel_us": 1.5}
    return bench_kernels.new_result(quick=False) | {
        "gpu": facts | {"cuda": "13.0", "driver": None},
        "ceilings": ceilings,
        "parts": list(parts),
    }


def verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {target.name: target.verdict() for target in kernel_targets.targets(result)}


def peer(us: float, ratio: float) -> dict[str, Any]:
    return {"us": summary(us), "ratio": summary(ratio), "graph": True}


def test_verdicts_are_in_microseconds_on_an_h100_and_in_shares_elsewhere() -> None:
    name = "Qwen3-30B-A3B bf16, 1 token"
    peers = {"F.grouped_mm": peer(60, 2.0), "transformers batched_mm": peer(27, 0.9), "cuBLAS loop": peer(3, 0.1)}
    part = measured_part("layers", name, measured_row("layer", 30.0, nbytes=75_000_000, peers=peers))
    on_h100 = verdicts(measured_result("NVIDIA H100 80GB HBM3", part))
    assert on_h100[name] == "reached: 30 us"
    assert on_h100[f"{name}: speed over peers"] == "NOT reached: 0.9x"
    assert on_h100["Qwen3-30B-A3B bf16, 4 tokens"] == "not measured"
    for gpu in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"):
        elsewhere = verdicts(measured_result(gpu, part))
        assert elsewhere[f"{name}: share of the floor"] == "NOT reached: 0.8333" and name not in elsewhere


def test_the_miss_and_the_indirection_are_held_against_their_limits() -> None:
    miss = measured_row("one decode miss", 210.0, link_bytes=10_000_000, peers={"copy, then launch": peer(260, 1.24)})
    slots = measured_row("slot indirection", 100.0, peers={"contiguous weights": peer(98, 0.98)})
    parts = measured_part("miss", "Qwen3", miss), measured_part("indirection", "Qwen3", slots)
    found = verdicts(measured_result("NVIDIA H100 80GB HBM3", *parts))
    assert found["one decode miss, beyond the time of the link: Qwen3"] == "NOT reached: 10 us"
    assert found["slot indirection, slower than contiguous weights by: Qwen3"] == "NOT reached: 2.041 %"


def test_the_report_hides_no_failure() -> None:
    layer = measured_row("layer", 30.0, nbytes=75_000_000, failed={"transformers grouped_mm": "not installed"})
    good = measured_part("layers", "Qwen3-30B-A3B bf16, 1 token", layer, measured_row("moe_up", 20.0, nbytes=5e7))
    broken = measured_part("attention", "attention") | {"status": "failed", "error": "Traceback\nKernelError: odd"}
    wrong = {"name": "moe_up", "error": math.nan, "limit": 4e-3, "passed": False}
    partly = measured_part("small ops", "small ops") | {"errors": ["router_topk: boom"], "checks": [wrong]}
    result = json.loads(json.dumps(measured_result("NVIDIA H100", good, broken, partly)))
    text = kernel_report.render(result)
    for said in (
        "attention, attention: failed: KernelError: odd",
        "small ops: failed: router_topk: boom",
        "0 passed, 1 failed: small ops, moe_up (nan)",
        "not installed",
        "| 30 (27-33)",
        "| 83%",
        "| moe_up ",
    ):
        assert said in text, said
    assert "| moe_up " not in kernel_report.render(result, short=True)


def test_what_moves_next_to_nothing_is_held_against_a_launch() -> None:
    part = measured_part("small ops", "small ops", measured_row("route_plan", 3.7, nbytes=96))
    assert "| route_plan | 3.7 (3.33-4.07) | 1.5 (a launch)" in kernel_report.render(measured_result("H100", part))


def test_quick_figures_are_held_against_nothing() -> None:
    part = measured_part("layers", "Qwen3-30B-A3B bf16, 1 token", measured_row("layer", 3.0, nbytes=10))
    result = measured_result("NVIDIA H100", part) | {"quick": True}
    assert set(verdicts(result).values()) == {"not measured"}
    assert "measures nothing" in kernel_report.render(result)


class BrokenWorker:
    """Answers all but ``attention``, and dies of that."""

    born = 0

    def __init__(self, *_: object) -> None:
        BrokenWorker.born += 1

    def call(self, method: str, **_: object) -> dict[str, Any]:
        if method == "attention":
            raise WorkerError("the worker of the kernels died with exit status -11")
        if method == "facts":
            return {"gpu": measured_result("NVIDIA H100")["gpu"]}
        if method == "ceilings":
            return measured_result("NVIDIA H100")["ceilings"]
        return {"rows": [], "checks": [], "errors": ["one: bad"] if method == "small_ops" else []}

    def close(self) -> None:
        pass


def test_a_part_that_fails_is_written_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setattr(bench_kernels, "new_worker", BrokenWorker)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--json", str(out)])
    BrokenWorker.born = 0
    assert bench_kernels.main() == 1
    result = json.loads(out.read_text())
    status = {part["section"]: part["status"] for part in result["parts"]}
    assert status["attention"] == "failed" and status["miss"] == status["layers"] == "measured"
    assert BrokenWorker.born == 3  # a fresh process after each failure
    assert len(result["parts"]) == len(bench_kernels.all_parts())


def test_a_worker_that_cannot_start_is_no_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(BrokenWorker):
        def call(self, method: str, **_: object) -> dict[str, Any]:
            raise WorkerError("the worker of the kernels died with exit status 1")

    monkeypatch.setattr(bench_kernels, "new_worker", Dead)
    result = bench_kernels.new_result(quick=False)
    bench_kernels.Bench(result, None, deadline=math.inf).run(bench_kernels.all_parts())
    assert [(part["name"], part["status"]) for part in result["parts"]] == [("facts", "failed")]
    text = kernel_report.render(result)
    assert "died with exit status 1" in text and "nothing was measured" not in text


def test_no_part_begins_after_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "new_worker", BrokenWorker)
    result = bench_kernels.new_result(quick=True)
    bench_kernels.Bench(result, tmp_path / "result.json", deadline=0.0).run(bench_kernels.all_parts())
    assert {part["status"] for part in result["parts"]} == {"skipped"}
    assert "the time was up" in kernel_report.render(result)


class Still:
    """Runs its first step once."""

    def __init__(self, steps: Sequence[Any], name: str = "") -> None:
        self.num_steps, self.name = len(steps), name
        steps[0]()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> kernel_worker.KernelBench:
    if DEVICE.type == "cuda":
        pytest.skip("the bench itself runs there")
    for name in ("Replay", "captured"):
        monkeypatch.setattr(kernel_worker, name, Still)
    monkeypatch.setattr(kernel_worker, "times_us", lambda them: {name: [2.0, 3.0] for name in them})
    monkeypatch.setattr(kernel_worker, "gpu_facts", lambda: {"l2_bytes": 1})
    monkeypatch.setattr(kernel_worker, "small", lambda shape: moe_shapes.MoEShape(shape.name, 128, 128, 4, 2))
    monkeypatch.setattr(kernel_worker, "QUICK_POOL", 1)
    return kernel_worker.KernelBench("cpu")


@pytest.mark.parametrize(("format", "tokens"), [("bf16", 1), ("bf16", 3), ("bf12", 3), ("fp8", 1), ("int4", 3)])
def test_a_layer_is_checked_and_every_kernel_timed(parts: kernel_worker.KernelBench, format: str, tokens: int) -> None:
    found = parts.layer("Qwen3-30B-A3B", format, tokens, quick=True)
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) >= 5
    rows = {row["what"]: row for row in found["rows"]}
    assert {"layer", "moe_up", "moe_down", "route_plan", "moe_combine"} <= rows.keys()
    assert ("moe_gemv_up" in rows) == (format == "bf16" and tokens == 1)
    layer = rows["layer"]
    assert layer["us"]["median"] == 2.5 and layer["nbytes"] > 0
    assert rows["moe_up"]["nbytes"] + rows["moe_down"]["nbytes"] == pytest.approx(layer["nbytes"])
    others = layer["peers"].keys() | layer["failed"].keys()
    assert others == (set(kernel_worker.peer_names(tokens)) if format == "bf16" else set())
    assert format != "bf16" or {"F.grouped_mm", "cuBLAS loop"} <= layer["peers"].keys(), layer["failed"]


def test_a_wrong_kernel_is_not_timed(parts: kernel_worker.KernelBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_paths, "moe_combine", lambda y_TKH, weights_TK: y_TKH.sum(1))
    with pytest.raises(kernel_worker.WrongResult, match="layer: relative error"):
        parts.layer("Qwen3-30B-A3B", "int4", 3, quick=True)


def test_indirection_and_the_miss_run(parts: kernel_worker.KernelBench) -> None:
    found = parts.indirection("Qwen3-30B-A3B", "bf16", 3, quick=True)
    assert "contiguous weights" in found["rows"][0]["peers"]
    for format in ("bf16", "int4"):
        found = parts.miss("Qwen3-30B-A3B", format, quick=True)
        assert found["rows"][0]["link_bytes"] == moe_shapes.MoEShape("", 128, 128, 4, 2).expert_bytes(format)
        assert [check["passed"] for check in found["checks"]] == [True] * 4
        peers = found["rows"][0]["peers"]
        assert peers.keys() == {"copy, then launch", "page_gather, then launch"}
        assert all(peer["graph"] for peer in peers.values()), "launched one by one it is the host that is timed"


def test_the_ops_of_a_decode_step_run(parts: kernel_worker.KernelBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_ops, "CONTEXTS", ((1, 128),))
    monkeypatch.setattr(small_ops, "PREFILL_TOKENS", 65)
    for found in (parts.attention(quick=True), parts.small_ops(quick=True)):
        assert found["errors"] == []
        assert all(check["passed"] for check in found["checks"]) and len(found["rows"]) == len(found["checks"])
    assert kernel_targets.plan_name(16) in {row["what"] for row in found["rows"]}


def test_nan_never_passes() -> None:
    assert not moe_paths.Check("any", math.nan, 1.0).passed and moe_paths.Check("any", 1.0, 1.0).passed
    assert math.isnan(moe_paths.relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)))


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def microseconds(timed: Still) -> float:
        order.append(timed.name)
        return 30_000.0

    monkeypatch.setattr(gpu_timing, "microseconds", microseconds)
    slow, fast = Still([lambda: None], "slow"), Still([lambda: None] * 9, "fast")
    times = gpu_timing.times_us({"slow": slow, "fast": fast})
    assert order[:6] == ["slow", "slow", "fast", "fast", "slow", "fast"]
    assert len(times["slow"]) == len(times["fast"]) == gpu_timing.MIN_ROUNDS
    assert gpu_timing.rounds_for(1.0) == gpu_timing.MAX_ROUNDS


def test_the_pause_outlasts_a_launch_however_slow_the_host_is() -> None:
    slow = gpu_timing.Queued([lambda: time.sleep(1e-3)] * 20)
    assert slow.pause_cycles / gpu_timing.FASTEST_HZ > 20e-3
    assert gpu_timing.Queued([lambda: None] * 20).pause_cycles == gpu_timing.LONG_PAUSE_CYCLES


@pytest.mark.parametrize(("version", "mended"), [("2.11.0+cu130", ["end", "release"]), ("2.12.0+cu130", [])])
def test_steps_that_no_graph_can_hold_leave_no_capture_under_way(
    version: str, mended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, str]] = []

    @contextmanager
    def capture(graph: object, pool: str) -> Iterator[None]:
        yield
        raise RuntimeError("invalid capture")

    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    for name in ("CUDAGraph", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(gpu_timing, "_warm_up_stream", MagicMock())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: calls.append(("end", *pool)))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: calls.append(("release", *pool)))
    assert isinstance(gpu_timing.captured([lambda: None]), gpu_timing.Queued)
    assert calls == [(call, 0, "pool") for call in mended]


def test_steps_pass_the_cache_three_times() -> None:
    shape = moe_shapes.MoEShape("any", 128, 128, 8, 2)
    pool = Pool(shape, "bf16", "cpu", pool_bytes=3_000_000)
    assert sorted(pool.slots_LE.flatten().tolist()) == list(range(len(pool.rows_SB))) and len(pool.slots_LE) > 2
    assert (pool.slots_LE.flatten().diff() != 1).sum() > len(pool.rows_SB) / 2, "slots in order show no indirection"
    l2_bytes = 4_000_000
    steps = pool.steps(2, l2_bytes)
    assert len(steps) * shape.mean_experts(2) * pool.expert_bytes >= 3 * l2_bytes
    assert {step.layer for step in steps} == set(range(len(pool.slots_LE)))
