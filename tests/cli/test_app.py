"""The frame: exit codes, one-line errors, help."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from duoserve import __version__
from duoserve.cli import generate
from duoserve.errors import ConfigError
from duoserve.replaying.hardware import HARDWARE


def test_the_version_is_that_of_the_installed_package(duoserve):
    assert duoserve("--version").out == f"duoserve {__version__}\n"
    assert version("duoserve") == __version__


@pytest.mark.parametrize("command", [[], ["generate"], ["info"], ["pack"], ["trace"], ["train-predictor"]])
def test_help_has_examples(duoserve, command):
    ran = duoserve(*command, "--help")
    assert ran.code == 0
    assert re.search(r"examples:\n  duoserve \w+", ran.out)


@pytest.mark.parametrize("argv", [[], ["fly"], ["info"], ["generate", "--expert-slots", "3", "--memory", "1GiB"]])
def test_wrong_usage_is_exit_code_2(duoserve, argv):
    ran = duoserve(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert "usage: duoserve" in ran.err


def failing_with(error):
    def from_pretrained(*args, **kwargs):
        raise error

    return from_pretrained


def test_an_error_of_duoserve_is_one_line_and_exit_code_1(duoserve, monkeypatch):
    monkeypatch.setattr(generate.MoEModel, "from_pretrained", failing_with(ConfigError("first\n  second")))
    ran = duoserve("generate", "--prompt", "a")
    assert (ran.code, ran.out, ran.err) == (1, "", "duoserve: error: first second\n")


def test_any_other_error_keeps_its_traceback(duoserve, monkeypatch):
    monkeypatch.setattr(generate.MoEModel, "from_pretrained", failing_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        duoserve("generate", "--prompt", "a")


def test_ctrl_c_is_exit_code_130(duoserve, monkeypatch):
    monkeypatch.setattr(generate.MoEModel, "from_pretrained", failing_with(KeyboardInterrupt()))
    ran = duoserve("generate", "--prompt", "a")
    assert (ran.code, ran.err) == (130, "")


def test_a_reader_that_leaves_ends_the_command_quietly(model_folder, buffered_command):
    """``duoserve info MODEL | true``: stdout is a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    buffered_command["args"] += ["info", str(model_folder)]
    ran = subprocess.run(**buffered_command, stdout=writing, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", "mixtral-8x7b", "--hardware", ",".join(HARDWARE), "--json"]], ids=["short", "long"]
)
def test_a_full_disk_behind_stdout_is_one_line_and_exit_code_1(buffered_command, words):
    """A long line fails when it is printed, a short one when the command is done."""
    buffered_command["args"] += words
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(**buffered_command, stdout=full, check=False)
    assert ran.returncode == 1
    assert re.fullmatch(rb"duoserve: error: \[Errno 28\] No space left on device: .*\n", ran.stderr)


def test_closed_streams_are_no_errors(duoserve, model_folder, buffered_command, monkeypatch):
    words = ["generate", str(model_folder), "--prompt", "a", "--max-tokens", "2"]
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    ran = subprocess.run(**buffered_command | {"args": [*closing, *buffered_command["args"], *words]}, check=False)
    assert ran.returncode == 0
    monkeypatch.setattr(sys, "stdin", None)
    ran = duoserve("generate", model_folder)
    assert ran.code == 1 and ran.err.startswith("duoserve: error: ")
