"""The copy bench without a GPU: its table from a machine that is made up, and the whole of it in the host's memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_copy
from gpu import copy_machines, copy_report
from gpu.copy_table import SIZES, CopyMachine, Way, measure, targets
from tests.bench.conftest import Ran

LINK = 50e9


class MadeUp(CopyMachine):
    """A link with a latency of 10 us; kernels read at ``zero_copy`` of its rate; one way raises, one corrupts."""

    def __init__(
        self,
        zero_copy: float = 0.9,
        raises: Way | None = None,
        corrupts: Way | None = None,
        error: type[BaseException] = RuntimeError,
    ) -> None:
        self.zero_copy, self.raises, self.corrupts, self.error = zero_copy, raises, corrupts, error

    def seconds(self, way: Way, nbytes: int) -> list[float]:
        if way is self.raises:
            raise self.error("no such way\nand more")
        rate = LINK * (self.zero_copy if way is Way.ZERO_COPY else 1)
        return [10e-6 + nbytes / rate, 10e-6 + nbytes / rate, 20e-6 + nbytes / rate]

    def arrives(self, way: Way, nbytes: int) -> bool:
        return way is not self.corrupts


def result_of(machine: CopyMachine) -> dict[str, Any]:
    result = bench_copy.conditions("bench_copy", False) | measure(machine, SIZES, lambda so_far: None)
    return result | {"targets": [target.to_dict() for target in targets(result)]}


def test_rates_and_verdicts() -> None:
    result = result_of(MadeUp())
    assert result["ceilings"][Way.TO_DEVICE.value] == pytest.approx(LINK, rel=0.01)
    small = next(c for c in result["cells"] if c["nbytes"] == 4096 and c["way"] == Way.TO_DEVICE.value)
    assert small["bytes_per_s"]["median"] == pytest.approx(4096 / (10e-6 + 4096 / LINK))
    assert small["bytes_per_s"]["low"] < small["bytes_per_s"]["median"] == small["bytes_per_s"]["high"]
    verdicts = {target["name"]: target["reached"] for target in result["targets"]}
    assert verdicts["8 MiB pieces / best rate"] is False  # 10 us of 178
    assert verdicts["read by a kernel / copied: Mixtral-8x7B expert, bf16"] is True
    assert not bench_copy.failed(result)
    assert "50.0" in copy_report.render(result) or "49.9" in copy_report.render(result)


def test_a_slow_kernel_is_not_passed() -> None:
    verdicts = {t["name"]: t["reached"] for t in result_of(MadeUp(zero_copy=0.8))["targets"]}
    assert [reached for name, reached in verdicts.items() if "kernel" in name] == [False] * 3


def test_what_fails_is_named_and_not_measured() -> None:
    result = result_of(MadeUp(raises=Way.ZERO_COPY))
    assert bench_copy.failed(result)
    assert result["ceilings"][Way.ZERO_COPY.value] is None
    assert [t["verdict"] for t in result["targets"]][1:] == ["not measured"] * 3
    report = copy_report.render(result)
    assert "RuntimeError: no such way" in report and "not measured" in report


def test_bytes_that_change_fail_the_bench() -> None:
    result = result_of(MadeUp(corrupts=Way.FROM_DEVICE))
    assert bench_copy.failed(result) and "**FAILED**" in copy_report.render(result)


def test_a_run_that_is_cut_off_leaves_the_ways_that_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways, out = list(Way), tmp_path / "copy.json"
    interrupted = MadeUp(raises=ways[2], error=KeyboardInterrupt)
    monkeypatch.setattr(bench_copy, "HostCopies", lambda: interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_copy.run(tiny=True, out=out)
    left = json.loads(out.read_text())
    assert {cell["way"] for cell in left["cells"]} == {way.value for way in ways[:2]}
    assert [check["name"] for check in left["checks"]] == [f"bytes {way.value}" for way in ways[:2]]
    assert all(left["ceilings"][way.value] for way in ways[:2]) and left["ceilings"][ways[2].value] is None
    assert left["bench"] == "bench_copy" and left["seconds"] > 0
    monkeypatch.setattr(sys, "argv", ["copy_report.py", str(out)])
    copy_report.main()
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if line.startswith("| 4 KiB")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[2:] == ["not measured"] * 3 and "not measured" not in cells[:2]
    assert f"bytes {ways[1].value}" in said and f"bytes {ways[2].value}" not in said


def test_verdicts_of_what_there_is_when_a_run_is_cut_off() -> None:
    found: list[list[str]] = []
    measure(MadeUp(), SIZES, lambda so_far: found.append([target.verdict() for target in targets(so_far)]))
    assert found[0] == found[-1][:1] != ["not measured"]  # pieces to the device; what kernels read comes last


def test_noise_is_drawn_once_and_no_two_rows_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = torch.randint

    def counted(low: int, high: int, size: Any, **options: Any) -> torch.Tensor:
        drawn.append(size[0])
        return draw(low, high, size, **options)

    monkeypatch.setattr(copy_machines, "NOISE_BYTES", 1025)
    monkeypatch.setattr(torch, "randint", counted)
    rows_NB = torch.zeros(8, 4096, dtype=torch.uint8)
    for _ in range(5):
        copy_machines.fill_with_noise(rows_NB.zero_())
    assert sum(drawn) <= 1025
    assert len({bytes(row.tolist()) for row in rows_NB}) == 8
    assert int((rows_NB == 0).sum()) < 8 * 4096 // 16  # as random bytes have, all of each row


@pytest.mark.parametrize("way", Way)
def test_the_hosts_copies_arrive(way: Way) -> None:
    machine = copy_machines.HostCopies()
    assert machine.arrives(way, 8192)
    assert all(seconds > 0 for seconds in machine.seconds(way, 8192))


def test_the_command(bench_result: Callable[..., Ran]) -> None:
    _, printed, result = bench_result("bench_copy", "--tiny", seconds=120)
    assert "measures no link" in printed
    assert {check["passed"] for check in result["checks"]} == {True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", Way)
def test_a_gpus_copies_arrive(way: Way) -> None:
    machine = copy_machines.GpuCopies()
    assert machine.arrives(way, 1 << 20)
    assert all(0 < seconds < 1 for seconds in machine.seconds(way, 1 << 20))
