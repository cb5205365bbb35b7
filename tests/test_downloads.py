"""What of a hub id is downloaded, and when: no weights before its small files show that they can be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duoserve import CheckpointError, ConfigError, MoEModel
from duoserve.errors import DuoServeError
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fake_hub import NAME, FakeHub
from tests.helpers.toys import greedy

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """It has a Mixtral in several shards."""
    return FakeHub(save_mixtral(tmp_path / "repository", shard="100KB"), tmp_path / "snapshot", monkeypatch)


def changed(name: str, **fields: Any) -> Callable[[Path], None]:
    """Changes fields of a JSON file."""

    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], type[DuoServeError], str]] = {
    "architecture": (changed("config.json", model_type="dbrx"), ConfigError, "model_type is 'dbrx'"),
    "field": (changed("config.json", hidden_act="gelu"), ConfigError, "hidden_act is 'gelu'"),
    "quantization": (
        changed("config.json", quantization_config={"quant_method": "compressed-tensors"}),
        ConfigError,
        "quant_method is 'compressed-tensors'",
    ),
    "names": (changed(INDEX, weight_map={"x": "model-1.safetensors"}), CheckpointError, "no file has what the model"),
    "pickles": (changed(INDEX, weight_map={"x": "model.bin"}), CheckpointError, "pickled weights are never opened"),
    "end tokens": (
        changed("generation_config.json", eos_token_id="</s>"),
        ConfigError,
        "generation_config.json: eos_token_id is '</s>'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_run_is_refused_before_its_weights_are_downloaded(hub: FakeHub, case: str) -> None:
    change, kind, message = REFUSED[case]
    change(hub.repository)
    with pytest.raises(kind, match=message):
        MoEModel.from_pretrained(NAME)
    assert hub.weights == []


def test_one_that_can_be_run_is_downloaded_whole(hub: FakeHub, tmp_path: Path) -> None:
    with MoEModel.from_pretrained(NAME, cache_dir=tmp_path) as model:
        assert len(model.generate([5, 9, 2], greedy(4)).token_ids) == 4
    assert hub.weights == sorted(path.name for path in hub.repository.glob("*.safetensors"))
    assert len(hub.weights) > 1


def test_one_without_an_index_is_judged_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(save_mixtral(tmp_path / "repository"), tmp_path / "snapshot", monkeypatch)
    with MoEModel.from_pretrained(NAME, cache_dir=tmp_path) as model:
        assert model.config.num_experts == 8
    assert hub.weights == ["model.safetensors"]


def test_what_the_cache_has_is_not_judged_twice(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MoEModel.from_pretrained(NAME, cache_dir=tmp_path).close()
    monkeypatch.setattr("duoserve.models.opened.by_index", None)
    MoEModel.from_pretrained(NAME, cache_dir=tmp_path).close()
