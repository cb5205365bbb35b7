"""The CPU bench runs end to end on its tiny model, and says what it did not reach and did not measure."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
import shapes
import tables
from cpu import checks as cpu_checks
from cpu import report
from cpu import rows as cpu_rows
from cpu import summary as cpu_summary
from cpu.contestants import MODULES, Run, disk_contestants, resident_contestants
from tests.bench.conftest import Ran

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def quick(bench_result: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of one round on the tiny model; AssertionError with its report when a check fails."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    words = "--quick", "--rounds", "1", "--threads", "1", "--folder", str(tmp_path_factory.mktemp("bench") / "mixtral")
    return bench_result("bench_cpu", *words, seconds=1800).result


def failed(result: dict[str, Any]) -> list[str]:
    return [check["name"] for check in result["checks"] if check["passed"] is False]


def test_all_compute_the_same_and_read_from_where_they_should(quick: dict[str, Any]) -> None:
    assert not failed(quick)
    names = {check["name"] for check in quick["checks"]}
    assert {"logits equal transformers'", "logits of duoserve lru", "tokens of duoserve on-demand"} <= names
    measured = {target["name"]: target["reached"] is not None for target in quick["targets"]}
    absent = {name for name in measured if "llama.cpp" in name} if "xllamacpp" in quick["not_measured"] else set()
    if quick["cap_bytes"] is None:
        absent |= {name for name in measured if name.endswith("llama.cpp's, same limit")}
    in_bf12 = ("a quarter of the experts", "bf12 in a quarter's memory")  # no part of a quick run
    absent |= {name for name in measured if name.startswith(in_bf12)}
    assert {name for name, was in measured.items() if not was} == absent
    played = quick["rounds"]["resident"].keys() | quick["rounds"]["disk"].keys()
    assert not played & cpu_rows.QUICK_WITHOUT
    assert quick["least_misses"].keys() == set(cpu_rows.POLICIES) - cpu_rows.QUICK_WITHOUT
    for least in quick["least_misses"].values():
        assert 0 <= least["pooled"] <= least["per_layer"] < least["uses"]
    assert {"logits of duoserve resident int8 equal transformers'", "tokens of duoserve resident int8"} <= names
    by_name = {target["name"]: target for target in quick["targets"]}
    assert by_name["bytes read in decode / misses x slot bytes"]["reached"] is True
    assert quick["routing_overlap"]["distinct_tokens"] > 4


def test_peers_that_were_not_measured_are_not_passed(quick: dict[str, Any], tmp_path: Path) -> None:
    """The same figures without those of the peers, as an environment without them gives."""
    ours = {
        tier: {name: played for name, played in rounds.items() if name.startswith("duoserve")}
        for tier, rounds in quick["rounds"].items()
    }
    for name in ours["resident"] | ours["disk"]:
        torch.save(torch.ones(3), cpu_rows.logits_file(tmp_path, name))
    raw = quick | {"rounds": ours, "routing": None, "not_measured": ["transformers", "accelerate", "xllamacpp"]}
    disk = quick["machine"]["disk"]["filesystem"]
    result = raw | cpu_summary.summarize(shapes.SHAPES["quick"], raw, disk, tmp_path)
    peers = ("transformers", "accelerate", "llama.cpp")
    against_peers = [one for one in result["targets"] if any(peer in one["name"] for peer in peers)]
    assert [(target["reached"], target["verdict"]) for target in against_peers] == [(None, "not measured")] * 12
    assert not failed(result)
    assert "transformers was not measured" in report.render(result)


def test_the_rows_that_run_op_by_op_are_named(tmp_path: Path) -> None:
    run = Run(shapes.SHAPES["quick"], tmp_path, tmp_path, 1, 1, tuple(MODULES), prompt=[1], cap_bytes=1 << 30)
    ours = [each for each in (*resident_contestants(run), *disk_contestants(run)) if each.kind == "duoserve"]
    assert len(ours) > 8
    assert {each.name for each in ours if "decode_mode" not in each.options} == set(cpu_rows.OP_BY_OP)


def test_our_policy_must_choose_the_tokens_of_compiled_steps_in_ram() -> None:
    rounds = {cpu_rows.COMPILED: [{"token_ids": [1, 2, 3]}], cpu_rows.OURS_POLICY: [{"token_ids": [1, 2, 3]}]}
    assert all(check["passed"] for check in cpu_checks.token_checks(rounds, [1, 2, 4]))
    rounds[cpu_rows.OURS_POLICY] = [{"token_ids": [1, 2, 4]}]
    assert [check["passed"] for check in cpu_checks.token_checks(rounds, [1, 2, 4])] == [True, False]


def test_the_disks_best_rate_is_the_best_of_all_rounds_and_of_the_probe() -> None:
    slow = {"prefill_read": 30, "ttft_s": 2.0, "decode_read": 22, "itl_s": [1.0, 1.0]}
    raw = {"ceilings": {"disk_bytes_per_s": {"1": 12.0, "2": 16.0}}, "rounds": {"disk": {"a": [slow, slow]}}}
    assert cpu_summary.disk_best(raw) == {"bytes_per_s": 16.0, "by": "the probe, 2 threads"}
    raw["rounds"]["disk"] |= {"b": [slow, slow | {"decode_read": 50}], "c": [slow | {"prefill_read": 40}]}
    assert cpu_summary.disk_best(raw) == {"bytes_per_s": 25.0, "by": "b, decode"}
    raw["rounds"]["disk"]["c"][0]["prefill_read"] = 60
    assert cpu_summary.disk_best(raw) == {"bytes_per_s": 30.0, "by": "c, a prompt"}


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


def test_a_module_of_the_benches_is_found_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "tables.py").write_text("raise SystemExit('this is the working folder')")
    command = [sys.executable, *harness.as_module("tables")]
    subprocess.run(command, cwd=tmp_path, env=harness.module_env(), check=True)


def test_a_worker_that_died_before_it_was_called_is_closed_without_a_word() -> None:
    with harness.Worker("test", ["-c", "import time; time.sleep(60)"], {}) as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(harness.WorkerError, match="the worker of test died with exit status -9"):
            worker.call("double", n=1)
    worker.close()


def test_a_results_folder_is_made_and_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "result.json"
    assert harness.result_file(str(out)) == out
    assert out.parent.is_dir() and not out.exists()  # no empty result
    harness.write_result(out, {"figure": 1})
    assert harness.result_file(str(out)) == out and json.loads(out.read_text()) == {"figure": 1}
    for wrong in (out.parent, out / "result.json"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{wrong} cannot be written: "):
            harness.result_file(str(wrong))


@pytest.mark.parametrize("bench", [path.stem for path in sorted(BENCH.glob("*.py")) if '"--json"' in path.read_text()])
def test_every_bench_looks_at_its_result_file_before_it_measures(
    bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [bench, "--json", str(tmp_path / "file" / "result.json")])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(bench).main()
    assert "cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("readme", ["README.md", "bench/results/README.md"])
def test_the_files_that_a_readme_names_are_there(readme: str) -> None:
    text = (BENCH.parent / readme).read_text()
    named = set(re.findall(r"(?<![\w/.-])(?:bench|duoserve|tests)/[\w/.-]+\.py\b", text))
    started = re.findall(r"PYTHONPATH=bench python -m ([\w.]+)", text)
    named |= {f"bench/{module.replace('.', '/')}.py" for module in started}
    assert len(named) > 5
    assert sorted(file for file in named if not (BENCH.parent / file).exists()) == []


def test_the_report_replaces_only_what_is_between_the_markers() -> None:
    markers = begin, end = "<!-- bench -->", "<!-- /bench -->"
    readme = f"# Title\n\n{begin}\nold\n{end}\n\nend\n"
    assert tables.into_readme(readme, "new", markers) == f"# Title\n\n{begin}\n\nnew\n\n{end}\n\nend\n"
    for broken in ("no markers", f"{end} {begin}", readme + readme):
        with pytest.raises(SystemExit, match="needs one"):
            tables.into_readme(broken, "new", markers)
