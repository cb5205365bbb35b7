"""The one command for a GPU machine: what it does without a GPU, and that it benches even when tests fail."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from tests.test_decode_on_gpu import Progress

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")

# Claims a GPU, and to have all packages; answers for pytest and the benches; lets Python do the rest.
FAKE_PYTHON = """#!/usr/bin/env bash
all=$*
json=${all##*--json }
case "$*" in
    *get_device_name*)
        case ${TORCH:-works} in
            works) echo nvidia-h100 ;;
            fails) exec "$REAL_PYTHON" -c "raise RuntimeError('the driver')" ;;
        esac ;;
    *find_spec*xdist*) exit "${XDIST:-0}" ;;
    *find_spec*) exit 0 ;;
    *"-m pytest"*)
        [[ $all != *"-k stress"* ]] || printf '%s' "$STRESS_SAYS"
        echo "pytest $* in ${STRESS_STEPS:-no} steps"
        [[ $all != *"${PYTEST_FAILS:-none}"* ]] || echo "test_it FAILED [ 50%]"
        trap 'echo "what was found"; exit 2' INT
        while [[ $all =~ ${PYTEST_HANGS:-^$} ]]; do sleep 0.1; done
        exit "$PYTEST_STATUS" ;;
    *bench/bench_copy.py*--json* | *bench/bench_serve.py*--json*)
        [[ ${BENCH_SAYS:-all} == nothing ]] || echo "$*"
        echo "{}" >"${json%% *}"; exit "$BENCH_STATUS" ;;
    *bench/bench_kernels.py*--json*)
        [[ ${KERNELS:-real} == fake ]] || exec "$REAL_PYTHON" "$@"
        echo "$*"; exit "$BENCH_STATUS" ;;
    *"-m serve.report"* | *"-m gpu.copy_report"*) echo "short report" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


# What compute-sanitizer prints of a run that it was not told to end, and of an error in it.
BANNER = "========= COMPUTE-SANITIZER"
INVALID = f"""{BANNER}
========= Invalid __global__ write of size 4 bytes
=========     at fill_kernel+0x70
=========     Address 0x7f0000000200 is out of bounds
========="""
ENDED = """========= Error: process didn't terminate successfully
========= Target application returned an error
========= ERROR SUMMARY: 0 errors"""

FAKE_SANITIZER = """#!/usr/bin/env bash
echo "$SANITIZER_SAYS"
exec "${@:5}"
"""


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In the repository."""
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=300, check=False
    )


def test_the_suites_syntax() -> None:
    done = run("bash", "-n", "bench/gpu_suite.sh")
    assert done.returncode == 0, done.stderr


@NO_GPU
def test_the_suite_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    done = run("bash", "bench/gpu_suite.sh", PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert "no CUDA GPU: no test and no bench was run" in done.stdout and "not measured" in done.stdout
    assert not (tmp_path / "out").exists()


def stress_says(**steps: int) -> str:
    """What the test of stress prints of so many steps in each mode."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        for mode, done in steps.items():
            progress = Progress(mode)
            progress.done(done // 2, every=1)
            progress.done(done, every=1)
    return printed.getvalue()


def suite(folder: Path, *parts: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The suite under the fake Python."""
    fake = folder / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    sanitizer = folder / "compute-sanitizer"
    sanitizer.write_text(FAKE_SANITIZER)
    sanitizer.chmod(0o755)
    settings = {"REAL_PYTHON": sys.executable, "PYTEST_STATUS": "0", "BENCH_STATUS": "0", "PYTHON": str(fake)}
    settings |= {"STRESS_SAYS": stress_says(event=10000, graph=10000), "SANITIZER_SAYS": BANNER}
    settings |= {"PATH": f"{folder}:{os.environ['PATH']}"}
    return run("bash", "bench/gpu_suite.sh", *parts, **(settings | {"OUT": str(folder / "out")} | env))


@NO_GPU
@pytest.mark.parametrize(("pytest_status", "status"), [(0, 0), (1, 1)])
def test_the_suite_benches_even_when_tests_fail(tmp_path: Path, pytest_status: int, status: int) -> None:
    done = suite(tmp_path, PYTEST_STATUS=str(pytest_status))
    assert done.returncode == status, done.stdout + done.stderr
    tested = "FAILED" if status else "passed"
    tests_said = (
        f"GPU tests {tested}, stress of 10000 event steps and 10000 graph steps {tested}, kernel tests {tested}"
    )
    last = f"{tests_said}, copy bench passed, kernel bench passed, serving bench passed"
    assert last in done.stdout.splitlines()[-1]
    out = tmp_path / "out"
    said = [line.partition(":")[0] for line in done.stdout.splitlines() if re.match(r"tests/\S+\.py: pytest", line)]
    tests = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    kernels = {file for file in tests if file.startswith("tests/kernels/")}
    marked = {file for file in tests if re.search(r"mark\.gpu\b", tests[file])} - kernels
    first = [f"tests/test_{what}on_gpu.py" for what in ("timeline_", "decode_", "", "")]  # the last one in two parts
    stress = "tests/test_decode_on_gpu.py"
    others = sorted(marked.difference(first), key=lambda file: (file.startswith("tests/bench/"), file))
    on_gpu = [*first, *others, stress]
    assert said[: len(on_gpu)] == on_gpu
    assert sorted(said[len(on_gpu) :]) == sorted(kernels - cpu_only())
    commands = re.findall(r"^pytest -m pytest (.*)", (out / "suite.log").read_text(), re.MULTILINE)
    assert sorted(command.split()[0] for command in commands) == sorted(said)
    assert all(("-m gpu" in command) == (command.split()[0] in marked) for command in commands)
    assert sorted(re.findall(r" -k (.*?) -vv", "\n".join(commands))) == [
        "cap or plan", "not (cap or plan)", "not stress", "stress -s",
    ]  # fmt: skip
    assert [command.split()[-2] for command in commands if "-k stress" in command] == ["10000"]
    for bench in ("copy", "kernels", "serve"):
        assert [path.suffix for path in sorted(out.glob(f"{bench}-nvidia-h100-*"))] == [".json", ".md"]
    assert len(list(out.iterdir())) == 7  # what the head of the script promises


@NO_GPU
@pytest.mark.parametrize(
    ("cores", "xdist", "each"),
    [("64", "0", "4"), ("16", "0", "4"), ("8", "0", "2"), ("7", "0", None), ("16", "1", None)],
)
def test_what_compiles_much_is_spread_over_processes_where_there_are_cores(
    tmp_path: Path, cores: str, xdist: str, each: str | None
) -> None:
    done = suite(tmp_path, "kernel-tests", "gpu-tests", CORES=cores, XDIST=xdist)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = re.findall(r"^pytest -m pytest (\S+) (.*)", (tmp_path / "out" / "suite.log").read_text(), re.MULTILINE)
    spread = {file: found[1] for file, options in commands if (found := re.search(r"-n (\d+) ", options))}
    assert spread == (dict.fromkeys(compile_most() | {"tests/test_decode_on_gpu.py"}, each) if each else {})
    assert {file for file, _ in commands} > spread.keys() | compile_most()


@NO_GPU
def test_what_compiles_most_comes_first(tmp_path: Path) -> None:
    done = suite(tmp_path, "kernel-tests", CORES="16", TESTS_SECONDS="1", PYTEST_HANGS=".")
    assert done.returncode == 1 and "no time is left" in done.stdout
    begun = set(re.findall(r"gpu_suite: (\S+) did not finish", (tmp_path / "out" / "suite.log").read_text()))
    assert len(compile_most()) == 4 and begun > compile_most() and len(begun) == 8


def compile_most() -> set[str]:
    """Those that compile the most kernels."""
    return named("compile_most")


def cpu_only() -> set[str]:
    """The tests of kernels that run nothing on a GPU."""
    return named("cpu_only")


def named(which: str) -> set[str]:
    """The files of tests of kernels that the suite names so."""
    (names,) = re.findall(rf"^{which}='(.*)'", (ROOT / "bench/gpu_suite.sh").read_text(), re.MULTILINE)
    return {f"tests/kernels/test_{name}.py" for name in names.split("|")}


def test_what_is_left_out_or_comes_first_is_there() -> None:
    assert [file for file in cpu_only() | compile_most() if not (ROOT / file).exists()] == []


@NO_GPU
def test_tests_that_hang_are_interrupted_so_that_they_say_what_they_have_found(tmp_path: Path) -> None:
    limits = {"TESTS_SECONDS": "3", "GPU_TESTS_SECONDS": "8", "STRESS_SECONDS": "1", "STRESS_STEPS": "7000"}
    says = stress_says(event=7000, graph=1250)
    done = suite(tmp_path, "tests", PYTEST_HANGS=".", PYTEST_FAILS="test_moe_fill", STRESS_SAYS=says, **limits)
    ended = "GPU tests cut off, stress of 7000 event steps and 1250 graph steps cut off, kernel tests FAILED"
    assert done.returncode == 1 and done.stdout.endswith(f"{ended}; see {tmp_path}/out\n")
    log = (tmp_path / "out" / "suite.log").read_text()
    for file in ("tests/test_timeline_on_gpu.py", "tests/kernels/test_moe_fill.py"):
        assert re.search(rf"what was found\ngpu_suite: {file} did not finish in \d+ s", log)
    caps = re.search(r"-k cap or plan (?:.*\n)*?gpu_suite: tests/test_on_gpu.py did not finish in (\d+) s", log)
    assert caps and int(caps[1]) >= 1  # its own share, whatever those before it do
    assert re.search(r"tests/test_\w+.py: no time is left", done.stdout)


@NO_GPU
@pytest.mark.parametrize(
    ("says", "fails", "ended"),
    [
        (f"{BANNER}\n{ENDED}", "none", "cut off"),
        (f"{INVALID}\n{ENDED}", "none", "FAILED"),
        (BANNER, "test_decode_on_gpu", "FAILED"),
    ],
)
def test_errors_that_the_sanitizer_found_before_its_time_was_up_are_said(
    tmp_path: Path, says: str, fails: str, ended: str
) -> None:
    env = {"SANITIZE_SECONDS": "1", "PYTEST_HANGS": ".", "SANITIZER_SAYS": says, "PYTEST_FAILS": fails}
    done = suite(tmp_path, "sanitize", STRESS_SAYS=stress_says(event=24), **env)
    assert done.returncode == 1
    assert f"gpu_suite: sanitizer over 24 event steps {ended}; see" in done.stdout.splitlines()[-1]
    assert ("\n========= Invalid __global__ write of size 4 bytes\n" in done.stdout) == ("Invalid" in says)
    assert ("test_it FAILED" in done.stdout) == (fails != "none")


@NO_GPU
@pytest.mark.parametrize(("status", "ended"), [(0, "passed"), (9, "FAILED")])
def test_what_the_sanitizer_ends_with_counts(tmp_path: Path, status: int, ended: str) -> None:
    done = suite(tmp_path, "sanitize", PYTEST_STATUS=str(status), STRESS_SAYS="")
    assert done.returncode == int(status > 0)
    assert f"gpu_suite: sanitizer over no steps {ended}; see" in done.stdout.splitlines()[-1]


@NO_GPU
def test_a_part_by_itself(tmp_path: Path) -> None:
    done = suite(tmp_path, "copy", "serve", BENCH_STATUS="1")
    assert done.returncode == 1
    assert "gpu_suite: copy bench FAILED, serving bench FAILED" in done.stdout.splitlines()[-1]
    assert "pytest" not in (tmp_path / "out" / "suite.log").read_text()


@NO_GPU
def test_parts_come_in_the_order_they_are_named(tmp_path: Path) -> None:
    done = suite(tmp_path, "serve", "--part", "gpu-tests", "copy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "serving bench passed, GPU tests passed, copy bench passed" in done.stdout.splitlines()[-1]
    assert "tests/kernels/" not in (tmp_path / "out" / "suite.log").read_text()


@NO_GPU
def test_what_has_no_time_left_is_skipped_and_limits_shrink(tmp_path: Path) -> None:
    done = suite(tmp_path, "--within", "130", "copy", "serve")
    assert "the link, at most 90 s" in done.stdout
    whole = re.search(r"whole models, at most (\d+) s", done.stdout)
    assert whole and 100 < int(whole[1]) <= 130
    (asked,) = re.findall(
        r"bench_serve.py .*--seconds (\d+)", (next((tmp_path / "out").glob("serve-*.md"))).read_text()
    )
    assert int(whole[1]) - 80 == int(asked)
    done = suite(tmp_path, "--within", "10", "copy")
    assert done.returncode == 1 and "copy SKIPPED" in done.stdout.splitlines()[-1]


@NO_GPU
@pytest.mark.parametrize(("within", "least", "most"), [("50", 25, 35), ("70", 40, 55), ("600", 225, 225)])
def test_the_kernel_bench_has_time_for_its_rows_however_little_is_left(
    tmp_path: Path, within: str, least: int, most: int
) -> None:
    done = suite(tmp_path, "--within", within, "kernels", KERNELS="fake")
    asked = [int(seconds) for seconds in re.findall(r"bench_kernels.py --seconds (\d+)", done.stdout)]
    if not asked:  # a machine that took five seconds to get there
        assert within == "50" and "kernels SKIPPED" in done.stdout.splitlines()[-1]
    assert all(least <= seconds <= most for seconds in asked), done.stdout


@NO_GPU
def test_a_kernel_bench_without_time_for_a_row_leaves_it_to_those_behind(tmp_path: Path) -> None:
    done = suite(tmp_path, "--within", "44", "kernels", "copy", KERNELS="fake")
    assert done.returncode == 1 and "kernels SKIPPED, copy bench passed" in done.stdout.splitlines()[-1]
    done = suite(tmp_path, "kernels", KERNELS="fake", BENCH_SECONDS="20")
    assert done.returncode == 0 and "bench_kernels.py --seconds 20 " in done.stdout


@NO_GPU
@pytest.mark.parametrize(("part", "name"), [("serve", "serving"), ("copy", "copy")])
def test_a_bench_that_ends_before_its_report_has_one_of_its_json(tmp_path: Path, part: str, name: str) -> None:
    done = suite(tmp_path, part, BENCH_STATUS="1", BENCH_SAYS="nothing")
    assert done.returncode == 1 and f"{name} bench FAILED" in done.stdout.splitlines()[-1]
    (report,) = (tmp_path / "out").glob(f"{part}-*.md")
    assert report.read_text() == "short report\n"


def results_of_today(folder: Path, name: str) -> list[Path]:
    """Where the suite writes what it measures; of tomorrow too, since a day may end meanwhile."""
    folder.mkdir()
    now = datetime.now(UTC)
    days = [f"{now + timedelta(days=later):%Y-%m-%d}" for later in (0, 1)]
    return [folder / f"{name}-nvidia-h100-{day}.json" for day in days]


@NO_GPU
def test_figures_of_an_earlier_run_are_not_said_to_be_this_ones(tmp_path: Path) -> None:
    for old in results_of_today(tmp_path / "out", "kernels"):
        old.write_text(json.dumps({"gpu": {"name": "OF THIS MORNING"}}))
        old.with_suffix(".md").write_text("OF THIS MORNING")
    done = suite(tmp_path, "kernels", KERNELS="fake", BENCH_STATUS="1")
    assert done.returncode == 1 and "kernel bench FAILED" in done.stdout.splitlines()[-1]
    assert "OF THIS MORNING" not in done.stdout and "Traceback" not in done.stderr
    assert len(list((tmp_path / "out").glob("*.json"))) == 1  # of the other day


@NO_GPU
def test_a_suffix_keeps_the_days_other_results(tmp_path: Path) -> None:
    kept = results_of_today(tmp_path / "out", "copy")
    for old in kept:
        old.write_text("real")
    done = suite(tmp_path, "copy", RESULT_SUFFIX="-quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [old.read_text() for old in kept] == ["real"] * 2
    new = set((tmp_path / "out").glob("copy-*")) - set(kept)
    assert {path.suffix for path in new} == {".json", ".md"}
    assert all(re.search(r"\d-quick\.\w+$", path.name) for path in new)


def test_a_torch_that_does_not_work_is_no_missing_gpu(tmp_path: Path) -> None:
    done = suite(tmp_path, "copy", TORCH="fails")
    assert done.returncode == 2 and "has no torch that works: nothing can run" in done.stdout
    assert "the driver" in done.stderr and not (tmp_path / "out").exists()


def test_a_python_without_torch_is_said(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    done = run("bash", "bench/gpu_suite.sh", PYTHON=str(bare), OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and "has no torch that works: nothing can run" in done.stdout
    assert not done.stderr


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = suite(tmp_path, "everything")
    assert done.returncode == 2 and "no part is called everything" in done.stdout
    done = suite(tmp_path, "--within", "soon")
    assert done.returncode == 2 and "--within takes whole seconds" in done.stdout


def test_each_call_stays_below_ten_minutes() -> None:
    """What the head of the script promises: the limits of the parts that one call runs."""
    text = (ROOT / "bench/gpu_suite.sh").read_text()
    limits = {name: int(value) for name, value in re.findall(r"^(\w+)=(?:\$\{\w+:-)?(\d+)\}?", text, re.MULTILINE)}
    of = {part: limits[f"{part}_seconds"] for part in ("gpu_tests", "stress", "sanitize", "tests", "copy")}
    kernels = limits["bench_seconds"] + limits["grace"]
    serve = limits["serve_seconds"] + limits["serve_grace"]
    calls = of["gpu_tests"] + of["stress"] + of["sanitize"], of["tests"] + of["copy"], kernels, serve
    assert max(calls) <= 570
    for seconds in (*of.values(), kernels, serve):
        assert re.search(rf"at most +{seconds} s$", text, re.MULTILINE)
    example = re.search(r"^# +(COPY.*) \\\n# .* --within (\d+) copy kernels serve kernel-tests$", text, re.MULTILINE)
    assert example
    given = {name: int(value) for name, value in re.findall(r"(\w+)_SECONDS=(\d+)", example[1])}
    to_start, last_cell, least = 10, 30, 45  # a last cell takes seconds, but for a long prompt
    left = int(example[2]) - to_start - given["COPY"] - given["BENCH"] - limits["grace"]
    serves = min(given["SERVE"], left - limits["serve_grace"])
    assert serves >= 90 and left - serves - last_cell >= least  # for whole models, and for kernel-tests
    within = [int(seconds) for seconds in re.findall(r"--within (\d+)", text)]
    assert len(within) == 2 and sum(within) <= 15 * 60 - 2 * 120  # to start may take two minutes
