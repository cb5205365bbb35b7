"""``duoserve bench cpu`` and ``bench gpu``, in a checkout whose benches only write files, or fail."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from duoserve.cli import bench_report

ROOT = Path(__file__).resolve().parents[2]
BENCHES = (
    "bench_quantize",
    "bench_cpu",
    "cpu/report",
    "opening",
    "bench_plan",
    "bench_policies",
    "plan_here",
    "bench_predictors",
    "bench_routing",
)
# Says how it was called, and writes what it was told to write.
FAKE = """\
import sys, pathlib
words = sys.argv[1:]
print("SAID", pathlib.Path(sys.argv[0]).name, *words)
for option in ("--json", "--out"):
    if option in words:
        pathlib.Path(words[words.index(option) + 1]).write_text("measured")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    (folder / "bench" / "results").mkdir(parents=True)
    (folder / "bench" / "results" / "old.md").write_text("of another day")
    (folder / "bench" / "cpu").mkdir()
    for name in (*BENCHES, "bench_newcomer"):
        (folder / "bench" / f"{name}.py").write_text(FAKE)
    return folder


def scripts(text: str) -> list[str]:
    return [line.split()[1].removesuffix(".py") for line in text.splitlines() if line.startswith("SAID")]


def test_what_the_benches_need_is_asked_for_before_any_begins(duoserve, checkout, monkeypatch):
    monkeypatch.setattr(bench_report, "find_spec", lambda name: None)
    ran = duoserve("bench", "cpu", "--checkout", str(checkout))
    assert (ran.code, scripts(ran.out)) == (1, [])
    assert "needs transformers and accelerate" in ran.err


def test_all_benches_run_in_order(duoserve, checkout):
    ran = duoserve("bench", "cpu", "--checkout", checkout)
    assert ran.code == 0, ran.err
    assert scripts(ran.out) == [
        "bench_cpu",
        "report",
        "opening",
        "bench_plan",
        "bench_policies",
        "plan_here",
        "bench_newcomer",
    ]
    assert "--readme README.md" in ran.out and "--quick" not in ran.out
    assert "SAID bench_cpu.py --json bench/results/cpu-" in ran.out
    written = ran.out.partition("written:\n")[2].split()
    assert {Path(file).name.partition("-")[0] for file in written} == {"cpu", "plan", "policies", "newcomer"}
    [report] = (checkout / "bench" / "results").glob("cpu-*.md")
    assert report.read_text().startswith("SAID report.py")


def test_texts_add_what_needs_them(duoserve, checkout, tmp_path):
    ran = duoserve("bench", "cpu", "--checkout", checkout, "--texts", tmp_path)
    assert scripts(ran.out)[6:10] == ["bench_quantize", "bench_predictors", "bench_predictors", "bench_routing"]
    assert f"--model bard-fine --texts {tmp_path}" in ran.out


def test_quick_passes_through_and_leaves_the_readme(duoserve, checkout, tmp_path):
    ran = duoserve("bench", "cpu", "--checkout", checkout, "--quick", "--out", tmp_path / "new", "--json")
    assert ran.code == 0, ran.err
    files = [Path(file) for file in json.loads(ran.out)["written"]]
    assert {file.parent for file in files} == {tmp_path / "new"} and all("-quick." in file.name for file in files)
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    assert scripts(ran.err) == ["bench_cpu", "report", "opening"]
    assert "bench_cpu.py --quick" in ran.err and "--readme" not in ran.err


def test_a_script_that_fails_ends_it(duoserve, checkout):
    (checkout / "bench" / "cpu" / "report.py").write_text("print('SAID report.py'); raise SystemExit(7)")
    ran = duoserve("bench", "cpu", "--checkout", checkout)
    assert ran.code == 1 and "bench/cpu/report.py ended with status 7" in ran.err
    assert scripts(ran.out) == ["bench_cpu", "report"]
    assert not list((checkout / "bench" / "results").glob("cpu-*.md"))


def test_a_folder_that_cannot_be_made_is_refused_before_any_bench_begins(duoserve, checkout, tmp_path):
    (tmp_path / "file").touch()
    ran = duoserve("bench", "cpu", "--checkout", checkout, "--out", tmp_path / "file" / "new")
    assert (ran.code, scripts(ran.out)) == (1, [])
    assert f"--out {tmp_path}/file/new: cannot be written" in ran.err


def test_a_report_that_cannot_be_written_is_said(duoserve, checkout):
    in_the_way = "import pathlib, sys; pathlib.Path(sys.argv[-1]).with_suffix('.md').mkdir()"
    (checkout / "bench" / "bench_cpu.py").write_text(in_the_way)
    ran = duoserve("bench", "cpu", "--checkout", checkout)
    assert ran.code == 1 and f"--out {checkout}/bench/results: cannot be written" in ran.err


def test_no_checkout_is_refused(duoserve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = duoserve("bench", "cpu")
    assert ran.code == 1 and f"{tmp_path} has no bench/" in ran.err and "--checkout" in ran.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_is_refused_without_one(duoserve, checkout):
    ran = duoserve("bench", "gpu", "--checkout", checkout)
    assert ran.code == 1 and "needs a CUDA device" in ran.err and scripts(ran.out) == []


@pytest.mark.parametrize(("quick", "seconds", "suffix"), [([], "none", ""), (["--quick"], "40", "-quick")])
def test_gpu_runs_the_suite(duoserve, checkout, monkeypatch, quick, seconds, suffix):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    suite = 'echo "SAID $* ${BENCH_SECONDS-none}"; "$PYTHON" -c "print(1)" >"$OUT/copy-h100${RESULT_SUFFIX-}.md"\n'
    (checkout / "bench" / "gpu_suite.sh").write_text(suite)
    ran = duoserve("bench", "gpu", "--checkout", checkout, *quick)
    assert ran.code == 0, ran.err
    assert f"SAID copy kernels serve {seconds}" in ran.out
    assert ran.out.endswith(f"written:\n{checkout}/bench/results/copy-h100{suffix}.md\n")


@pytest.mark.parametrize("quick", [True, False])
def test_the_real_scripts_take_these_arguments(quick):
    args = argparse.Namespace(quick=quick, texts=None if quick else ROOT)
    jobs = bench_report.cpu_jobs(ROOT, ROOT / "bench" / "results", args)
    sources = {job.script: (ROOT / "bench" / job.script).read_text() for job in jobs}
    flags = [(job.script, word) for job in jobs for word in job.words if word.startswith("--")]
    assert flags and [pair for pair in flags if f'"{pair[1]}"' not in sources[pair[0]]] == []
    assert (ROOT / "bench" / "gpu_suite.sh").exists()
