"""``duoserve replay`` on a small synthetic trace and on a recorded one's file."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from duoserve.cli.plots import one_step, stalls
from duoserve.planning.model_cards import find_model
from duoserve.planning.sizes import layer_sizes
from duoserve.predictors.files import save_predictor
from duoserve.predictors.training import train
from duoserve.replaying.hardware import HARDWARE, Machine
from duoserve.scheduling.policies import get_policy
from tests.cli.conftest import Command, Ran
from tests.traces.drawn import drawn_trace
from tests.traces.small import save_trace

BARD = Path(__file__).resolve().parents[2] / "duoserve" / "assets" / "bard"
MADE_UP = ["replay", "synthetic:mixtral-8x7b", "--requests", "1", "--tokens", "4", "--prompt-tokens", "3"]


def test_a_table_with_a_row_for_each_slot_count_and_policy(duoserve: Command) -> None:
    ran = duoserve(*MADE_UP, "--slots", "64,50%", "--policies", "lru,duoserve,oracle")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["64", "lru"], ["64", "duoserve"], ["64", "oracle"]]
    assert len(lines) == 7


def test_json_and_csv_have_the_same_rows(duoserve: Command, tmp_path: Path) -> None:
    ran = duoserve(*MADE_UP, "--slots", "64", "--json", "--csv", tmp_path / "rows.csv")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)
    with (tmp_path / "rows.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == [row["policy"] for row in again]
    assert [row["tpot_s"] for row in rows] == [float(row["tpot_s"]) for row in again]


def test_a_trace_file_needs_a_models_sizes(duoserve: Command, tmp_path: Path) -> None:
    save_trace(drawn_trace(requests=2, tokens=4), tmp_path / "t.safetensors")
    command = ("replay", tmp_path / "t.safetensors", "--slots", "24", "--policies", "lru")
    ran = duoserve(*command)
    assert ran.code == 1 and "give --model" in ran.err
    assert duoserve(*command, "--model", "bard").code == 0
    assert duoserve(*command, "--model", "gpt-oss-20b").code == 0


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_the_trace_is_not_replaced_by_what_is_made_of_it(duoserve: Command, tmp_path: Path, option: str) -> None:
    path = tmp_path / "t.svg"
    save_trace(drawn_trace(requests=2, tokens=4), path)
    before = path.read_bytes()
    ran = duoserve("replay", path, "--model", "bard", "--slots", "24", "--policies", "lru", option, path)
    assert (ran.code, ran.out) == (1, "")
    assert f"{option} {path}: is the trace itself" in ran.err
    assert path.read_bytes() == before


def test_a_predictor_of_other_layers_is_refused(duoserve: Command, tmp_path: Path) -> None:
    trace = drawn_trace(requests=4, tokens=20)
    save_trace(trace, tmp_path / "t.safetensors")
    predictor, _ = train(trace, "lookahead")
    predictor.meta = replace(predictor.meta, layers=(0, 1, 2, 3, 4, 6))
    save_predictor(predictor, tmp_path / "p.safetensors", {})
    command = ("replay", tmp_path / "t.safetensors", "--slots", "24", "--policies", "lookahead")
    ran = duoserve(*command, "--model", "bard", "--predictor", tmp_path / "p.safetensors")
    assert ran.code == 1
    assert "p.safetensors: is the predictor of top-2 of 16 experts in layers [0, 1, 2, 3, 4, 6]" in ran.err


def test_a_trained_predictor_goes_to_the_policy_of_its_kind(duoserve: Command, tmp_path: Path) -> None:
    trace = drawn_trace(requests=4, tokens=20)
    save_trace(trace, tmp_path / "t.safetensors")
    save_predictor(train(trace, "lookahead")[0], tmp_path / "p.safetensors", {})
    command = ("replay", tmp_path / "t.safetensors", "--slots", "24", "--policies", "lookahead,duoserve", "--json")
    ran = duoserve(*command, "--model", "bard", "--predictor", tmp_path / "p.safetensors")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)
    assert [row["predictor"] for row in rows] == ["lookahead", None]
    assert rows[0]["recall_at_k"] > 0.5


def test_a_predictor_is_not_judged_by_what_it_was_trained_on(duoserve: Command, tmp_path: Path) -> None:
    """Of the trace that it was trained on only the requests held out are replayed, by every policy."""
    trace = drawn_trace(requests=8, tokens=20)
    predictor, held = train(trace, "lookahead")
    save_trace(trace, tmp_path / "t.safetensors")
    save_trace(trace.select(held), tmp_path / "held.safetensors")
    save_trace(trace.select([n for n in range(8) if n not in held]), tmp_path / "known.safetensors")
    save_predictor(predictor, tmp_path / "p.safetensors", {})

    def replayed(name: str) -> Ran:
        command = ("replay", tmp_path / name, "--slots", "24", "--policies", "lru,lookahead", "--json")
        return duoserve(*command, "--model", "bard", "--predictor", tmp_path / "p.safetensors")

    whole = replayed("t.safetensors")
    assert whole.code == 0 and "1 of 8 requests are replayed" in whole.err
    alone = replayed("held.safetensors")
    assert alone.code == 0 and "replayed" not in alone.err
    assert json.loads(whole.out) == json.loads(alone.out)
    known = replayed("known.safetensors")
    assert known.code == 1 and "has been trained on every prompt" in known.err


def test_policies_without_a_predictor_are_named(duoserve: Command) -> None:
    ran = duoserve(*MADE_UP, "--slots", "64", "--policies", "lru,activation-matrix,duoserve,duoserve-paper,oracle")
    assert ran.code == 0
    assert "without guesses, for want of a --predictor of their kind: activation-matrix, duoserve-paper\n" in ran.err


def test_the_precision_of_a_made_up_trace_is_that_of_its_guesses(duoserve: Command) -> None:
    sizes = ["--requests", "2", "--tokens", "40", "--prompt-tokens", "8", "--slots", "64"]
    rows = {}
    for precision in (0.4, 0.9):
        command = ("replay", "synthetic:mixtral-8x7b", *sizes, "--policies", "lru,lookahead,duoserve", "--json")
        ran = duoserve(*command, "--precision", str(precision))
        assert ran.code == 0, ran.err
        rows[precision] = json.loads(ran.out)
    for precision, (lru, lookahead, _) in rows.items():
        assert lru["tpot_s"] == rows[0.4][0]["tpot_s"]
        assert lookahead["recall_at_k"] == pytest.approx(precision, abs=0.05)
    assert rows[0.9][1]["tpot_s"] < rows[0.4][1]["tpot_s"]
    ran = duoserve(*MADE_UP, "--predictor", "p.safetensors")
    assert ran.code == 1 and "--predictor: synthetic:mixtral-8x7b is predicted by" in ran.err


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["popularity"], "0.safetensors: none of lru, lookahead, oracle takes the kind 'popularity'"),
        (["lookahead", "lookahead"], "1.safetensors: is the second of the kind 'lookahead'"),
    ],
)
def test_a_predictor_that_would_not_be_used_is_refused(
    kinds: list[str], said: str, duoserve: Command, tmp_path: Path
) -> None:
    trace = drawn_trace(requests=4, tokens=20)
    save_trace(trace, tmp_path / "t.safetensors")
    command = ["replay", tmp_path / "t.safetensors", "--model", "bard", "--policies", "lru,lookahead,oracle"]
    for number, kind in enumerate(kinds):
        path = tmp_path / f"{number}.safetensors"
        save_predictor(train(trace, kind)[0], path, {})
        command += ["--predictor", path]
    ran = duoserve(*command)
    assert ran.code == 1 and said in ran.err


@pytest.mark.parametrize(("form", "bits"), [([], 16), (["--format", "fp8"], 8), (["--format", "int4"], 4.19)])
def test_an_expert_is_as_large_as_its_format_makes_it(form: list[str], bits: float, duoserve: Command) -> None:
    """No format is the checkpoint's, as in ``plan``: bfloat16 for Mixtral. Scales are in the bits."""
    ran = duoserve(*MADE_UP, "--hardware", "pcie4", "--slots", "64", "--policies", "on-demand", "--json", *form)
    assert ran.code == 0, ran.err
    [row] = json.loads(ran.out)
    copied_s = row["tpot_s"] / (32 * 2)
    assert copied_s == pytest.approx(3 * 4096 * 14336 * bits / 8 / HARDWARE["pcie4"].link, rel=0.08)


def test_sizes_need_no_weights(duoserve: Command, tmp_path: Path) -> None:
    save_trace(drawn_trace(requests=2, tokens=4), tmp_path / "t.safetensors")
    (tmp_path / "model").mkdir()
    shutil.copy(BARD / "config.json", tmp_path / "model")
    command = ("replay", tmp_path / "t.safetensors", "--slots", "24", "--policies", "lru", "--json", "--model")
    without, whole = duoserve(*command, tmp_path / "model"), duoserve(*command, "bard")
    assert (without.code, whole.code) == (0, 0)
    assert without.out == whole.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--hardware", "abacus"], "hardware 'abacus' is not known"),
        (["--slots", "2"], "2 slots"),
        (["--policies", "mru"], "'mru' is not known"),
    ],
)
def test_what_cannot_be_replayed_is_refused(change: list[str], said: str, duoserve: Command) -> None:
    ran = duoserve(*MADE_UP, *change)
    assert ran.code == 1 and said in ran.err


@pytest.mark.parametrize("option", ["--requests", "--tokens", "--prompt-tokens"])
def test_a_made_up_trace_that_ram_cannot_hold_is_refused_with_the_arithmetic(option: str, duoserve: Command) -> None:
    ran = duoserve(*MADE_UP, option, "10000000000")
    assert ran.code == 1
    assert "x 32 layers of 8 experts take about" in ran.err and "TiB, but" in ran.err and option in ran.err


@pytest.mark.parametrize(
    "change",
    [
        ["--requests", "0"],
        ["--tokens", "-1"],
        ["--prompt-tokens", "0"],
        ["--seed", "-1"],
        ["--seed", str(1 << 64)],
        ["--requests", str(10**400)],
    ],
)
def test_a_made_up_trace_has_its_bounds(change: list[str], duoserve: Command) -> None:
    ran = duoserve(*MADE_UP, *change)
    assert ran.code == 2 and f"argument {change[0]}: {change[1]} is not a" in ran.err


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        ("--csv", "no/rows.csv", "cannot be written"),
        ("--plot", "no/plot.png", "cannot be drawn"),
        ("--plot", "plot.odd", "cannot be drawn"),
    ],
)
def test_what_cannot_be_written_is_said_behind_the_table(
    option: str, name: str, said: str, duoserve: Command, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra")
    ran = duoserve(*MADE_UP, "--slots", "64", "--policies", "lru", option, tmp_path / name)
    assert ran.code == 1
    assert "lru" in ran.out and f"{option} {tmp_path / name}: {said}" in ran.err


def test_a_plot_is_drawn(duoserve: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra")
    path = tmp_path / "plot.png"
    assert duoserve(*MADE_UP, "--slots", "64,128", "--policies", "lru", "--plot", path).code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_one_step_begins_at_zero_and_its_stalls_fill_the_compute_lane() -> None:
    machine = Machine(HARDWARE["pcie4"], layer_sizes(find_model("mixtral-8x7b"), "int4"))
    trace = drawn_trace(requests=1, tokens=3)
    copies, work = one_step(trace, get_policy("lru"), machine, 12, None)
    assert min(start for start, _ in work) == pytest.approx(0, abs=1e-9)
    end = max(stop for _, stop in work)
    assert all(0 <= start < stop <= end + 1e-9 for start, stop in copies)
    lane = sum(stop - start for start, stop in (*work, *stalls(work)))
    assert lane == pytest.approx(end)
