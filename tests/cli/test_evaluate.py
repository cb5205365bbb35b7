"""``duoserve evaluate`` from prompts to a recommendation beside the model."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from duoserve.cli import evaluate
from duoserve.cli.hardware_option import replayed_on
from duoserve.errors import TraceError
from duoserve.experts.checkpoint import Checkpoint
from duoserve.loading.recommendation import RECOMMENDATION_FILE
from duoserve.traces.trace import TraceMeta
from tests.cli.conftest import Command
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.small_tokenizers import byte_level_tokenizer
from tests.traces.small import save_trace, small_trace

BARD = Path(__file__).resolve().parents[2] / "duoserve" / "assets" / "bard"


def test_from_prompts_to_a_recommendation(duoserve: Command, tmp_path: Path) -> None:
    shutil.copytree(BARD, tmp_path / "bard")
    (tmp_path / "prompts.txt").write_text("To be, or\nEnter HAMLET\nMy lord,\n")
    command = ("evaluate", tmp_path / "bard", "--prompts", tmp_path / "prompts.txt", "--max-tokens", "6")
    dry = duoserve(*command, "--dry-run")
    assert dry.code == 0, dry.err
    assert "nothing was written" in dry.out and not (tmp_path / "bard" / RECOMMENDATION_FILE).exists()
    (tmp_path / "bard" / RECOMMENDATION_FILE).write_text("{")  # a broken one, which this is the remedy for
    ran = duoserve(*command, "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    written = json.loads((tmp_path / "bard" / RECOMMENDATION_FILE).read_text())
    assert said["folder"] == str(tmp_path / "bard") and written["policy"] == said["policy"]
    assert said["hardware"] == written["figures"]["hardware"] == replayed_on(None).name
    assert said["why"].startswith("Expect ") and written["figures"]["rows"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--slots", "2", "2 is 2 slots, but must lie in 3..24"),
        ("--slots", "25%,12.5", "slots '12.5' is neither a count nor a share"),
        ("--hardware", "abacus", "hardware 'abacus' is not known"),
        ("--hardware", "this", "this machine cannot be measured there"),
        ("--max-tokens", "1", "--max-tokens 1: no request would decode"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_prompts_are_run(
    option: str,
    value: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    duoserve: Command,
) -> None:
    no_folder_can_be_here = tmp_path / "file"
    no_folder_can_be_here.touch()
    monkeypatch.setenv("DUOSERVE_CACHE", str(no_folder_can_be_here / "cache"))
    ran = duoserve(*without_recording(tmp_path, monkeypatch), option, value)
    assert ran.code == 1 and said in ran.err


def test_a_recommendation_without_a_place_is_refused_before_the_prompts_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duoserve: Command
) -> None:
    command = without_recording(tmp_path, monkeypatch)
    (tmp_path / "m" / RECOMMENDATION_FILE).mkdir()
    ran = duoserve(*command)
    assert ran.code == 1 and "the recommendation cannot be written there" in ran.err
    with pytest.raises(AssertionError, match="was recorded"):
        duoserve(*command, "--dry-run")


def without_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """The command for a small model and two prompts, which must not come to run them."""

    def record(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was recorded")

    monkeypatch.setattr(evaluate, "record", record)
    folder = save_mixtral(tmp_path / "m", vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    return ["evaluate", folder, "--prompts", tmp_path / "p.txt"]


def with_trace(tmp_path: Path) -> list[str | Path]:
    """The command for a small model and a trace of it."""
    folder = save_mixtral(tmp_path / "m")
    with closing(Checkpoint.open(folder)) as checkpoint:
        meta = TraceMeta(checkpoint.fingerprint(), (0, 1, 2), num_experts=8, top_k=2)
    save_trace(small_trace(meta), tmp_path / "t.safetensors")
    return ["evaluate", folder, "--trace", tmp_path / "t.safetensors"]


def test_a_given_trace_needs_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duoserve: Command
) -> None:
    command = with_trace(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    ran = duoserve(*command, "--dry-run")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_was_found_is_said_also_where_it_cannot_be_written(
    form: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duoserve: Command
) -> None:
    """The disk has become full meanwhile."""

    def save_recommendation(*args: object) -> None:
        raise TraceError("no space left on device")

    monkeypatch.setattr(evaluate, "save_recommendation", save_recommendation)
    command = with_trace(tmp_path)
    ran = duoserve(*command, *form)
    assert ran.code == 1 and "no space left" in ran.err and "Expect " in ran.out
    assert (json.loads(ran.out)["folder"] is None) if form else ("nothing was written" in ran.out)


def test_a_seed_that_no_generator_takes_is_wrong_usage(duoserve: Command) -> None:
    ran = duoserve("evaluate", "bard", "--prompts", "p.txt", "--seed", "-1")
    assert ran.code == 2 and "argument --seed: -1 is not an integer in 0.." in ran.err


def test_one_prompt_is_too_few(tmp_path: Path, duoserve: Command) -> None:
    folder = save_mixtral(tmp_path / "m")
    (tmp_path / "p.txt").write_text("one\n")
    ran = duoserve("evaluate", folder, "--prompts", tmp_path / "p.txt")
    assert ran.code == 1 and "give at least 2" in ran.err
