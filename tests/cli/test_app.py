"""The frame: exit codes, one-line errors, help."""

import os
import re
import subprocess
from importlib.metadata import version

import pytest

from duoserve import __version__
from duoserve.cli import generate
from duoserve.errors import ConfigError


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
