"""The newcomer's bench: README's line is understood, and what is said of the times is what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import bench_newcomer
import newcomer_report
import tables
from newcomer_report import DOWNLOAD, EVALUATE, FIRST_TEXT, SET_UP

ROOT = Path(__file__).resolve().parents[2]


def steps(**seconds):
    kinds = {"venv": SET_UP, "download": DOWNLOAD, "install": SET_UP, "text": FIRST_TEXT, "evaluate": EVALUATE}
    return [{"kind": kinds[name], "command": name, "seconds": value} for name, value in seconds.items()]


def test_the_readmes_line_is_taken_apart():
    found = bench_newcomer.set_up((ROOT / "README.md").read_text())
    assert [word.partition("==")[0] for word in found.requirements] == ["torch"]
    assert found.generate[:2] == ("duoserve", "generate")


def test_another_line_is_refused():
    for readme in ("none", "<!-- run line -->\n```sh\npip install duoserve\n```"):
        with pytest.raises(SystemExit, match="run line"):
            bench_newcomer.set_up(readme)


def test_prompts_are_as_many_as_asked_for():
    play = bench_newcomer.PLAY.read_text()
    prompts = bench_newcomer.own_prompts(play, 24)
    assert len(set(prompts)) == 24 and all(prompt in play and "\n" not in prompt for prompt in prompts)


def test_downloads_do_not_count_and_all_else_does():
    text, evaluated = newcomer_report.verdicts(steps(venv=100, download=900, install=199, text=1, evaluate=301))
    assert (text["seconds"], text["verdict"]) == (300, "reached")
    assert (evaluated["seconds"], evaluated["verdict"]) == (301, "missed")


def test_what_was_not_measured_has_no_verdict():
    text, evaluated = newcomer_report.verdicts(steps(venv=None, text=1, evaluate=2))
    assert (text["seconds"], text["verdict"], evaluated["verdict"]) == (None, "not measured", "reached")


def test_a_command_that_fails_ends_the_bench_by_name(tmp_path):
    newcomer = bench_newcomer.Newcomer(tmp_path)
    with pytest.raises(SystemExit, match="false --really ended with status 1"):
        newcomer.run(SET_UP, "false", "--really")
    assert newcomer.run(SET_UP, "echo", "said") == "said\n" and len(newcomer.steps) == 1
    newcomer.first_text("echo", "said")
    assert [step["kind"] for step in newcomer.steps] == [SET_UP, FIRST_TEXT]


def test_a_path_that_takes_too_long_has_its_report_where_the_readme_says(tmp_path, monkeypatch):
    file = min((ROOT / "bench" / "results").glob("newcomer-*.json"))
    slow = steps(venv=100, install=199, text=2, evaluate=1)
    result = json.loads(file.read_text()) | {"steps": slow, "verdicts": newcomer_report.verdicts(slow)}
    monkeypatch.setattr(bench_newcomer, "measure", lambda args: result)
    readme, out = tmp_path / "README.md", tmp_path / "newcomer-here.json"
    readme.write_text("\n".join(newcomer_report.MARKERS))
    monkeypatch.setattr("sys.argv", ["bench_newcomer.py", "--json", str(out), "--readme", str(readme)])
    assert bench_newcomer.main() == 1
    [named] = re.findall(r"counted\s\(`(.*\.md)`\)", readme.read_text())
    assert "missed: 301" in Path(named).read_text()


def test_the_readme_says_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    [name] = re.findall(r"counted\s\(`(bench/results/newcomer-.*)\.md`", readme)
    result = json.loads((ROOT / f"{name}.json").read_text())
    said = newcomer_report.sentence(result, f"{name}.md")
    assert tables.into_readme(readme, said, newcomer_report.MARKERS) == readme
    assert (ROOT / f"{name}.md").read_text() == newcomer_report.render(result) + "\n"
