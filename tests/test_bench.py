"""The CPU bench runs end to end on its tiny model, and says what it did not reach and did not measure."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


def load(name: str) -> ModuleType:
    """A module of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


harness, report = load("harness"), load("report")


def run_quick(folder: Path, *options: str) -> dict[str, Any]:
    """The result of one round on the tiny model; AssertionError with its report when a check fails."""
    out = folder / "result.json"
    command = [sys.executable, str(BENCH / "bench_cpu.py"), "--quick", "--rounds", "1", "--threads", "1"]
    files = ["--folder", str(folder / "mixtral"), "--json", str(out)]
    done = subprocess.run([*command, *files, *options], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def failed(result: dict[str, Any]) -> list[str]:
    return [check["name"] for check in result["checks"] if check["passed"] is False]


def test_duoserve_alone_is_measured_and_its_peers_are_not_passed(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="it builds the checkpoint")
    result = run_quick(tmp_path, "--engines", "duoserve")
    assert not failed(result)
    assert {"logits of duoserve lru", "tokens of duoserve on-demand"} <= {check["name"] for check in result["checks"]}
    by_name = {target["name"]: target for target in result["targets"]}
    assert by_name["bytes read in decode / misses x slot bytes"]["reached"] is True
    against_peers = [target for name, target in by_name.items() if "transformers" in name or "accelerate" in name]
    assert [(target["reached"], target["verdict"]) for target in against_peers] == [(None, "not measured")] * 3
    assert "transformers was not measured" in report.render(result)


def test_peers_compute_the_same_and_read_from_where_they_should(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    result = run_quick(tmp_path)
    assert not failed(result)
    assert "logits equal transformers'" in {check["name"] for check in result["checks"]}
    assert all(target["reached"] is not None for target in result["targets"])
    assert result["routing_overlap"]["distinct_tokens"] > 4


@pytest.mark.parametrize(
    ("value", "at_least", "reached", "verdict"),
    [
        (1.25, True, True, "reached: 1.25x"),
        (0.8, True, False, "NOT reached: 0.8x"),
        (1.3, False, False, "NOT reached: 1.3x"),
        (float("nan"), True, False, "NOT reached: nanx"),
        (float("nan"), False, False, "NOT reached: nanx"),
        (None, False, None, "not measured"),
    ],
)
def test_verdicts_hide_nothing(value: float | None, at_least: bool, reached: bool | None, verdict: str) -> None:
    target = harness.Target("speed", value, 1.0, at_least=at_least, unit="x")
    assert (target.reached, target.verdict()) == (reached, verdict)


def test_rounds_interleave_and_pair() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, Any]:
        order.append(name)
        return {"s": len(order)}

    rounds = harness.interleave(["a", "b"], 2, run)
    assert order == ["a", "b", "a", "b"]
    assert rounds == {"a": [{"s": 1}, {"s": 3}], "b": [{"s": 2}, {"s": 4}]}
    assert harness.Summary.of_pairs([4.0, 9.0, 1.0], [2.0, 3.0, 2.0]) == harness.Summary(2.0, 0.5, 3.0)


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "from harness import serve\n"
        "class Subject:\n"
        "    def double(self, n): print('noise'); return 2 * n\n"
        "    def close(self): pass\n"
        "serve(Subject)\n"
    )
    with harness.Worker("test", [str(script)], {"OMP_NUM_THREADS": "1"}) as worker:
        assert worker.call("double", n=4) == 8
        with pytest.raises(harness.WorkerError, match=r"(?s)failed in double.*TypeError"):
            worker.call("double", n=None)
        assert worker.call("double", n=1) == 2
    with pytest.raises(harness.WorkerError, match="died"), harness.Worker("test", ["-c", "pass"], {}) as worker:
        worker.call("double", n=1)


def test_the_report_replaces_only_what_is_between_the_markers() -> None:
    readme = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nend\n"
    assert report.into_readme(readme, "new") == f"# Title\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nend\n"
    for broken in ("no markers", f"{report.END} {report.BEGIN}", readme + readme):
        with pytest.raises(SystemExit, match="needs one"):
            report.into_readme(broken, "new")
