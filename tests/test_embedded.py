"""The models in the package: their files, what their cards say of them, and that all their experts have work."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from duoserve import MoEModel, SamplingParams
from duoserve.config import EngineConfig
from duoserve.experts.hub import EMBEDDED, EMBEDDED_FOLDER
from duoserve.text.tokenizer import Tokenizer
from duoserve.tracing import RecordingSpec, record

# A scene that no embedded model was trained on.
SCENE = (Path(__file__).parent / "macbeth.txt").read_text()
CONTEXT = 256
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "predictor.json",
    "predictor.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module", params=EMBEDDED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MoEModel]:
    with MoEModel.from_pretrained(request.param, expert_slots="50%", cache_dir=tmp_path_factory.mktemp("packs")) as it:
        yield it


@pytest.fixture
def folder(model: MoEModel) -> Path:
    names = {"mixtral": "bard", "qwen3_moe": "bard-fine"}
    return EMBEDDED_FOLDER / names[model.config.model_type]


def card(folder: Path, pattern: str) -> list[float]:
    """The figures that the card has where ``pattern`` says."""
    said = re.search(pattern, (folder / "README.md").read_text().replace("\n", " "))
    assert said, f"{folder.name}'s card has no {pattern}"
    return [float(figure) for figure in said.groups()]


def bits_per_byte(model: MoEModel, ids: list[int], num_bytes: int) -> float:
    """As the card's: every token with at least half a context before it."""
    nats, stride = 0.0, CONTEXT // 2
    for start in range(0, len(ids) - 1, stride):
        begin = max(0, start - stride)
        window = ids[begin : start + stride + 1]
        logits_TV, wanted_T = model.forward(window[:-1])[start - begin :], torch.tensor(window[1 + start - begin :])
        nats += torch.nn.functional.cross_entropy(logits_TV, wanted_T, reduction="sum").item()
    return nats / math.log(2) / num_bytes


def test_each_folder_has_what_a_model_needs_and_no_more(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == FILES
    assert sizes.pop("model.safetensors") <= 24e6
    assert sum(sizes.values()) <= 3e6


def test_both_speak_the_same_tokens() -> None:
    tokenizers = [json.loads((EMBEDDED_FOLDER / name / "tokenizer.json").read_text()) for name in EMBEDDED]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]


def test_it_writes_lines_of_a_play(model: MoEModel) -> None:
    text = model.generate("MACBETH.\n", SamplingParams(max_tokens=60, temperature=0.8, seed=4)).text
    assert text and "\n" in text and len(set(text.split())) > 10, text


def test_it_is_as_good_as_its_card_says(model: MoEModel, folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    measured = bits_per_byte(model, [0, *tokenizer.encode(SCENE), 1], len(SCENE.encode()))
    assert measured == pytest.approx(card(folder, r"of the scene in `tests/macbeth\.txt`: (\d\.\d+)")[0], abs=0.01)
    assert max(card(folder, r"Macbeth (\d\.\d+), Twelfth Night (\d\.\d+)")) <= 2.1


def test_every_expert_has_work(model: MoEModel, folder: Path, tmp_path: Path) -> None:
    """Each is used in one scene, and in whole plays by at least 0.16 of its even share.

    That is 2 % of the uses of 8 experts, and 0.25 % of the uses of 64.
    """
    router = model.config
    recording = RecordingSpec(tmp_path / "t", SamplingParams(max_tokens=1))
    trace = record(folder, [SCENE], recording, EngineConfig(), "resident")
    for layer, said in trace[0].layers.items():
        assert len(np.unique(said.topk_ids_NK)) == router.num_experts, f"layer {layer}"
    least, even = card(folder, r"Least used of all: (\d+\.\d)%")[0], 100 * router.top_k / router.num_experts
    assert least >= 0.16 * even
