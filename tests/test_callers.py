"""Warnings name the line of the program that called duoserve, however deep in the package they arise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import duoserve
from duoserve import MoEModel
from duoserve.callers import warn_caller

PACKAGE = Path(duoserve.__file__).parent
PLUGIN = PACKAGE.with_name("duoserve_plugin") / "plugin.py"


def called_from(path: Path, call: Callable[..., None], *arguments: object) -> Callable[[], None]:
    """A function of the file ``path`` that calls ``call``."""
    names = {"call": call, "arguments": arguments}
    exec(compile("def calling():\n    call(*arguments)", str(path), "exec"), names)
    return names["calling"]


def test_the_first_file_outside_the_package_is_named() -> None:
    within = called_from(
        PACKAGE / "loading" / "deciding.py", called_from(PACKAGE / "kernels" / "ops.py", warn_caller, "mind it")
    )
    for call, named in ((within, __file__), (called_from(PLUGIN, within), str(PLUGIN))):
        with pytest.warns(UserWarning, match="mind it") as said:
            call()
        assert [one.filename for one in said] == [named]


def test_so_is_who_loads_a_model_that_runs_in_another_way_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no-such-compiler") as said:
        MoEModel.from_pretrained("bard", decode_mode="compiled").close()
    assert [one.filename for one in said] == [__file__]


def test_so_is_who_loads_a_model_whose_pack_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MoEModel.from_pretrained("bard", expert_slots="50%", cache_dir=tmp_path).close()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))
    monkeypatch.setattr("duoserve.loading.placement.is_current", lambda folder, changed_ns: False)
    with pytest.warns(UserWarning, match="may not be made again") as said:
        MoEModel.from_pretrained("bard", expert_slots="50%", cache_dir=tmp_path).close()
    assert [one.filename for one in said] == [__file__]
