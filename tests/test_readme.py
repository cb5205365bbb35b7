"""Every command of README.md, run as it stands there.

Blocks are run, new ones too, but for the lines that are listed below with a reason. The arguments of those, and of the
commands that sentences and tables mention, are held against the real parsers: no flag is shown which does not exist.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from duoserve.cli.app import command_line, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

SET_UP = "makes an environment and downloads torch: .ci/run does this line, in a fresh environment"
DOWNLOADS = "needs a package index"
STAYS = "runs until it is stopped: tests/server start it"
NOT_RUN = {
    'python3 -m venv .venv && . .venv/bin/activate && pip install torch==2.13.0 && pip install -e . && duoserve generate --prompt "To be, or" --expert-slots 25%': SET_UP,  # noqa: E501
    "python3 -m venv .venv && . .venv/bin/activate && pip install torch==2.13.0 triton==3.7.1 && pip install -e '.[test]' && pytest -n 2 --dist loadfile": SET_UP,  # noqa: E501
    "pip install -e '.[serve]'": DOWNLOADS,
    "duoserve serve bard --expert-slots 25% --slo-ttft-ms 2000 --slo-tpot-ms 100": STAYS,
}
# What the reader has to bring: the commands say its name.
BROUGHT = {"prompts.txt": "To be, or not to be\nNow is the winter of our discontent\nIf music be the food of love\n"}
# Words between backticks that begin as a command does.
COMMANDS = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:duoserve [a-z]|python bench/|python -m|bash [.b]|pytest)")


def blocks(language: str, text: str = README) -> list[str]:
    """What stands between fences of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def inline(text: str = README) -> list[str]:
    """Commands between backticks, outside the fenced blocks, line ends as blanks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [found for span in re.findall(r"`([^`]+)`", prose) if COMMANDS.match(found := " ".join(span.split()))]


def shell_lines() -> list[str]:
    """The lines of all shell blocks, those that a backslash continues as one."""
    return [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines() if line.strip()]


def runnable() -> list[str]:
    """The shell blocks, without the lines that are not run."""
    kept = ["\n".join(line for line in block.splitlines() if line not in NOT_RUN) for block in blocks("sh")]
    return [block for block in kept if block.strip()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with all that the checkout has, and what the reader brings; what is written beside it is thrown away."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    for name, text in BROUGHT.items():
        (folder / name).write_text(text)
    return folder


def run(command: list[str], folder: Path) -> None:
    """Runs it in ``folder`` with a home and caches of its own, this package and this Python before all others."""
    home = folder.parent / "home"
    home.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"HOME": str(home), "DUOSERVE_CACHE": str(home / "cache"), "HF_HUB_OFFLINE": "1", "PATH": path}
    packages = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, **own, "PYTHONPATH": packages}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("block", runnable(), ids=lambda block: block.splitlines()[0][:40])
def test_shell_blocks_run_as_they_stand(block, checkout):
    run(["bash", "-euo", "pipefail", "-c", block], checkout)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0][:40])
def test_python_blocks_run_as_they_stand(block, checkout):
    run([sys.executable, "-c", block], checkout)


def test_what_is_not_run_is_still_in_the_readme():
    assert set(NOT_RUN) <= set(shell_lines())


def test_the_set_up_lines_are_those_that_ci_runs():
    below = re.findall(r"^<!-- (?:run|test) line -->\n```sh\n(.*)\n```$", README, re.MULTILINE)
    assert [line for line, why in NOT_RUN.items() if why is SET_UP] == below
    assert all(f'readme_line "{kind} line"' in (ROOT / ".ci/run").read_text() for kind in ("run", "test"))


@pytest.mark.parametrize("line", [*NOT_RUN, *inline()])
def test_what_is_not_run_has_arguments_that_exist(line):
    for command in line.split(" && "):
        check_arguments(command)


def check_arguments(command: str) -> None:
    """Fails where a command would end with a complaint about its arguments, or is one that this cannot judge."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    match words:
        case ["duoserve", name]:
            with pytest.raises(SystemExit, match=r"^0$"):
                command_line().parse_args([name, "--help"])
        case ["duoserve", *arguments]:
            for alternative in alternatives(arguments):
                command_line().parse_args(alternative)
        case ["python", script, *arguments]:
            source = (ROOT / script).read_text()
            unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]
            assert not unknown, f"{script} has no {unknown}"
        case ["bash", script, *_] | ["pytest", script] if not script.startswith("-"):
            assert (ROOT / script).exists()
        case ["pip", "install", *packages]:
            check_packages(packages)
        case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"] | ["pytest", "-n", "2", *_]:
            pass
        case _:
            pytest.fail(f"nothing here knows how to check {command!r}")


def alternatives(arguments: list[str]) -> Iterator[list[str]]:
    """What the notation of the README stands for: ``[MODEL]`` with and without, ``A | B`` one each, ``a,...`` as a."""
    if "|" in arguments:
        at = arguments.index("|")
        yield from alternatives(arguments[:at])
        yield from alternatives(arguments[at + 1 :])
        return
    words = [word.removesuffix(",...") for word in arguments]
    yield [word.strip("[]") for word in words]
    yield [word for word in words if not word.startswith("[")]


def check_packages(words: list[str]) -> None:
    """Every extra of this package that is asked for exists."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [extra for word in words for extras_of in re.findall(r"\[(.*)\]", word) for extra in extras_of.split(",")]
    assert set(asked) <= set(extras)


@pytest.mark.parametrize(
    "wrong",
    [
        "duoserve generate --prompt x --expert-slot-count 3",
        "duoserve bake MODEL",
        "duoserve trace bard",
        "python bench/bench_kernels.py --jsn x",
        "python bench/bench_nothing.py",
        "bash bench/nothing.sh",
        "pip install -e '.[sevre]'",
        "rm -rf .",
    ],
)
def test_a_wrong_command_is_noticed(wrong):
    with pytest.raises((SystemExit, AssertionError, OSError, pytest.fail.Exception)):
        check_arguments(wrong)


def test_the_notation_is_understood():
    assert list(alternatives(["generate", "[MODEL]"])) == [["generate", "MODEL"], ["generate"]]
    assert ["--hardware", "a"] in alternatives(["--hardware", "a,..."])
    assert inline("`duoserve\npack X` and `duoserve.kernels`, `python bench/a.py`\n```sh\n`duoserve x`\n```\n") == [
        "duoserve pack X",
        "python bench/a.py",
    ]


def test_the_plan_that_is_shown_is_the_plan_that_is_made(capsys):
    [command] = [words for words in inline() if words.startswith("duoserve plan mixtral-8x7b")]
    [shown] = [block for block in blocks("text") if block.startswith("rtx4090")]
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip() == shown.strip()
