"""The machine it runs on, as a card: rates are measured once, free memory is asked anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from duoserve.errors import ConfigError
from duoserve.planning import this_machine as measured
from duoserve.planning.measuring import RATES
from duoserve.planning.this_machine import FILE, this_machine

MADE_UP = dict.fromkeys(RATES, 0.5) | {"link": 3e9}


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Measurements of a CPU that take no time."""
    asked: list[Path] = []

    def measure(device: torch.device, folder: Path) -> dict[str, float]:
        asked.append(folder)
        return MADE_UP

    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(measured, "resolve", lambda name: torch.device("cpu"))
    return asked


def test_it_is_measured_once(times: list[Path], tmp_path: Path) -> None:
    first, again = this_machine(tmp_path), this_machine(tmp_path)
    assert times == [tmp_path]
    assert (first.link, again.link, again.disk, again.host_computes) == (3e9, 3e9, 0.5, True)
    this_machine(tmp_path, anew=True)
    assert times == [tmp_path] * 2


def test_free_memory_is_asked_anew(times: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(tmp_path)
    monkeypatch.setattr(measured, "free_bytes", lambda device: 12345)
    assert this_machine(tmp_path).memory_bytes == 12345


def test_another_machine_is_measured_too(times: list[Path], tmp_path: Path) -> None:
    this_machine(tmp_path)
    kept = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(kept | {"threads": -1}))
    this_machine(tmp_path)
    assert len(times) == 2
    (tmp_path / FILE).write_text(json.dumps({name: value for name, value in kept.items() if name != "reader"}))
    this_machine(tmp_path)
    assert len(times) == 3
    assert json.loads((tmp_path / FILE).read_text()) == kept


def test_a_malformed_file_is_refused(times: list[Path], tmp_path: Path) -> None:
    this_machine(tmp_path)
    kept = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(kept | {"disk": "fast"}))
    with pytest.raises(ConfigError, match=r"machine\.json: not every one of .*: delete the file"):
        this_machine(tmp_path)
