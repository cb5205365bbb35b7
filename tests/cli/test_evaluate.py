"""``duoserve evaluate`` from prompts to a choice beside the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from duoserve.choice import CHOICE_FILE
from duoserve.cli import main
from duoserve.cli.machines import replayed_on
from tests.checkpoints import save_mixtral

BARD = Path(__file__).resolve().parents[2] / "duoserve" / "assets" / "bard"


def test_from_prompts_to_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DUOSERVE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(BARD, tmp_path / "bard")
    (tmp_path / "prompts.txt").write_text("To be, or\nEnter HAMLET\nMy lord,\n")
    command = ["evaluate", str(tmp_path / "bard"), "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "6"]
    assert main([*command, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "bard" / CHOICE_FILE).exists()
    (tmp_path / "bard" / CHOICE_FILE).write_text("{")  # a broken one, which this is the remedy for
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "bard" / CHOICE_FILE).read_text())
    assert said["folder"] == str(tmp_path / "bard") and written["policy"] == said["policy"]
    assert said["hardware"] == written["figures"]["hardware"] == replayed_on(None).name
    assert said["why"].startswith("Expect ") and written["figures"]["rows"]


def test_a_seed_that_no_generator_takes_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "bard", "--prompts", "p.txt", "--seed", "-1"])
    assert "argument --seed: -1 is not an integer in 0.." in capsys.readouterr().err


def test_one_prompt_is_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_mixtral(tmp_path / "m")
    (tmp_path / "p.txt").write_text("one\n")
    assert main(["evaluate", str(folder), "--prompts", str(tmp_path / "p.txt")]) == 1
    assert "give at least 2" in capsys.readouterr().err
