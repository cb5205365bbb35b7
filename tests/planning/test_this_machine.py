"""The machine it runs on, as a card: rates are measured once, free memory is asked anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duoserve.errors import ConfigError
from duoserve.experts.layout import ExpertLayout
from duoserve.models.described import DescribedModel
from duoserve.planning import this_machine as measured
from duoserve.planning.formats import layout_in
from duoserve.planning.measuring import RATES
from duoserve.planning.model_cards import find_model
from duoserve.planning.rehearsal import PolicyTimes, PromptTimes, Rehearsal, StepTimes
from duoserve.planning.this_machine import FILE, this_machine, this_rehearsal

MADE_UP = dict.fromkeys(RATES, 0.5) | {"link": 3e9}


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Measurements of a CPU that take no time."""
    asked: list[Path] = []

    def measure(device: torch.device, folder: Path) -> dict[str, float]:
        asked.append(folder)
        return MADE_UP

    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(measured, "resolve_device", lambda name: torch.device("cpu"))
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


@pytest.mark.parametrize(
    ("name", "other"), [("cpu_model", "Neoverse-V1"), ("usable_cores", 0.5), ("get_num_threads", 63)]
)
def test_a_machine_of_another_cpu_or_share_is_another_machine(
    name: str, other: object, times: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder may be shared by machines of a cluster, and by containers of one machine."""
    this_machine(tmp_path)
    monkeypatch.setattr(torch if name == "get_num_threads" else measured, name, lambda: other)
    this_machine(tmp_path)
    this_machine(tmp_path)
    assert len(times) == 2


def test_a_malformed_file_is_refused(times: list[Path], tmp_path: Path) -> None:
    this_machine(tmp_path)
    kept = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(kept | {"disk": "fast"}))
    with pytest.raises(ConfigError, match=r"machine\.json: not every one of .*: delete the file"):
        this_machine(tmp_path)
    for text in ("", "{", "[]"):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ConfigError, match=r"machine\.json: no JSON object .*: delete the file"):
            this_machine(tmp_path)
    assert this_machine(tmp_path, anew=True) and json.loads((tmp_path / FILE).read_text()) == kept


def rehearsal(slot_bytes: int) -> Rehearsal:
    times = PolicyTimes(StepTimes((0.01, 0.02), 0.1), PromptTimes((0.0, 2.0), (1.0, 3.0), 0.5))
    return Rehearsal(slot_bytes, 16, {"lru": {"disk": times, "ram": times}})


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The prompts of rehearsals that take no time."""
    asked: list[int] = []

    def rehearse(model: DescribedModel, layout: ExpertLayout, prompt: int, folder: Path) -> Rehearsal:
        asked.append(prompt)
        return rehearsal(layout.slot_bytes)

    monkeypatch.setattr(measured, "rehearse", rehearse)
    monkeypatch.setattr(measured, "resolve_device", lambda name: torch.device("cpu"))
    return asked


BARD = find_model("bard")


def rehearse_bard(folder: Path, prompt: int = 16, form: str | None = None, *, anew: bool = False) -> Rehearsal | None:
    return this_rehearsal(BARD, layout_in(BARD.config, form, BARD.config.dtype), prompt, folder, anew=anew)


@pytest.mark.usefixtures("times", "rehearsed")
@pytest.mark.parametrize("asked", [this_machine, rehearse_bard])
def test_a_cache_folder_that_cannot_be_is_refused(asked: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/cache: this machine cannot be measured there .*DUOSERVE_CACHE"):
        asked(tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"this machine cannot be measured there .*DUOSERVE_CACHE"):
        asked(tmp_path / ("c" * 300))


def test_a_model_is_rehearsed_once_for_each_prompt_and_format(rehearsed: list[int], tmp_path: Path) -> None:
    first, again = rehearse_bard(tmp_path), rehearse_bard(tmp_path)
    assert first == again == rehearsal(393216)
    assert rehearsed == [16]
    rehearse_bard(tmp_path, 32)
    rehearse_bard(tmp_path, form="int8")
    rehearse_bard(tmp_path, anew=True)
    assert rehearsed == [16, 32, 16, 16]


def test_nothing_is_rehearsed_on_a_gpu_or_kept_of_what_is_too_large(
    rehearsed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "rehearse", lambda *_: None)
    assert rehearse_bard(tmp_path) is None
    monkeypatch.setattr(measured, "resolve_device", lambda name: torch.device("cuda"))
    assert rehearse_bard(tmp_path) is None
    assert (rehearsed, list(tmp_path.iterdir())) == ([], [])


def test_a_malformed_rehearsal_is_refused(rehearsed: list[int], tmp_path: Path) -> None:
    rehearse_bard(tmp_path)
    (file,) = tmp_path.iterdir()
    for text in (
        "{}",
        '{"slot_bytes": 1, "prompt": 2, "times": []}',
        '{"slot_bytes": 1, "prompt": 2, "times": {"lru": {"disk": [1, 2]}}}',
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"rehearsal-.*\.json: no rehearsal .*: delete the file"):
            rehearse_bard(tmp_path)
    for text in ("", "{", "[]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"rehearsal-.*\.json: no JSON object .*: delete the file"):
            rehearse_bard(tmp_path)
