"""The cards: what the families make of them has the published sizes."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from duoserve.errors import CheckpointError
from duoserve.models.stored import expert_layout
from duoserve.planning.model_cards import MODEL_CARDS, find_model

# Billions of parameters, layers for further tokens not counted, as their authors give them.
PUBLISHED = {
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671,
    "glm-4.5-air": 106.9,
    "gpt-oss-120b": 116.8,
    "gpt-oss-20b": 20.9,
    "mixtral-8x22b": 140.6,
    "mixtral-8x7b": 46.7,
    "qwen3-235b-a22b": 235.1,
    "qwen3-30b-a3b": 30.5,
}
# MB of one expert in the format of the checkpoint.
EXPERT_MB = {"mixtral-8x7b": 352, "qwen3-30b-a3b": 9.44, "deepseek-v3": 44.0, "gpt-oss-120b": 13.2}


@pytest.mark.parametrize("name", MODEL_CARDS)
def test_a_card_has_the_published_parameters(name: str) -> None:
    model = find_model(name)
    params = sum(map(prod, model.family.tensor_shapes(model.config).values()))
    assert params / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


@pytest.mark.parametrize(("name", "megabytes"), EXPERT_MB.items())
def test_an_expert_of_a_card_has_the_published_bytes(name: str, megabytes: float) -> None:
    config = find_model(name).config
    assert expert_layout(config, config.dtype).slot_bytes / 1e6 == pytest.approx(megabytes, rel=5e-3)


def test_a_card_goes_by_its_name_in_any_case() -> None:
    assert find_model("Mixtral-8x7B").config == find_model("mixtral-8x7b").config


def test_a_folder_goes_before_a_card_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixtral-8x7b").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_model("mixtral-8x7b")


def test_other_names_are_folders_hub_ids_and_embedded_models() -> None:
    assert find_model("bard").config.num_experts == 8
    with pytest.raises(CheckpointError, match="'gpt-9' is no folder here"):
        find_model("gpt-9")
