"""What a checkpoint is refused for: by an error that names the file, and before anything large is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import duoserve.loading.placement
from duoserve import CheckpointError, ConfigError, MoEModel
from duoserve.config import EngineConfig
from duoserve.loading.placement import Placement
from duoserve.models.described import described
from duoserve.models.opened import opened
from duoserve.models.registry import FAMILIES
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.small_tokenizers import byte_level_tokenizer
from tests.models.cases import FAMILIES as CASES
from tests.models.cases.case import SMALL

LOOKED_FOR = (
    *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = save_mixtral(tmp_path / "model", vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nobody may look whether there is a file of this name."""
    stat = Path.stat

    def refusing(self: Path, **options: Any) -> os.stat_result:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refusing)


@pytest.mark.parametrize("name", LOOKED_FOR)
def test_a_file_that_nobody_may_look_for_is_not_taken_for_absent(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, name)
    with pytest.raises(CheckpointError, match=rf"{folder / name}: .*Permission denied"):
        MoEModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_description_does_not_take_it_for_absent_either(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere")
    forbid(monkeypatch, name)
    with pytest.raises(CheckpointError, match=rf"{folder / name}: .*Permission denied"):
        described(folder)
    with pytest.raises(CheckpointError, match=rf"{folder / name}: .*Permission denied"):
        MoEModel.from_pretrained(folder)


@pytest.fixture
def nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither packs nor slots nor weights: the slow tier is the first of them."""

    def slow_tier(*_: object) -> None:
        raise AssertionError("the model was being loaded")

    monkeypatch.setattr(Placement, "slow_tier", slow_tier)


@pytest.mark.usefixtures("nothing_large")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.json"])
def test_damaged_files_of_text_are_refused_before_anything_large_is_loaded(name: str, folder: Path) -> None:
    (folder / name).write_text('{"damaged')
    with pytest.raises(CheckpointError, match=name):
        MoEModel.from_pretrained(folder)


@pytest.mark.usefixtures("nothing_large")
@pytest.mark.parametrize(("device", "mode"), [("cpu", "graph"), ("cpu", "event"), ("cuda", "compiled")])
def test_a_mode_that_the_device_does_not_have_is_refused_before_anything_large_is_loaded(
    device: str, mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duoserve.loading.placement, "resolve_device", torch.device)
    monkeypatch.setattr(duoserve.loading.placement, "free_bytes", lambda _: 1 << 30)
    with pytest.raises(ConfigError, match=f"decode_mode='{mode}' .* the device is {device}: use 'auto'"):
        MoEModel.from_pretrained(folder, device=device, decode_mode=mode)


@pytest.mark.usefixtures("nothing_large")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"policy": "on-demand"}, "policy 'on-demand' moves experts between the layers of a step"),
        ({"policy": "lru", "expert_slots": 8, "host_memory": 0}, "not all experts lie in pinned host memory"),
        ({"policy": "lru", "expert_slots": "100%"}, "choose policy 'resident'"),
    ],
)
def test_a_graph_that_cannot_be_had_is_refused_before_anything_large_is_loaded(
    options: dict[str, Any], why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duoserve.loading.placement, "resolve_device", torch.device)
    monkeypatch.setattr(duoserve.loading.placement, "free_bytes", lambda _: 1 << 30)
    with pytest.raises(ConfigError, match=f"decode_mode='graph' cannot be had: .*{why}"):
        MoEModel.from_pretrained(folder, device="cuda", decode_mode="graph", **options)


@pytest.mark.usefixtures("nothing_large")
@pytest.mark.parametrize("options", [{"policy": "lru", "expert_slots": 8}, {"policy": "resident"}])
def test_a_graph_that_may_be_had_is_not_refused_before_that(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duoserve.loading.placement, "resolve_device", torch.device)
    monkeypatch.setattr(duoserve.loading.placement, "free_bytes", lambda _: 1 << 30)
    with pytest.raises(AssertionError, match="the model was being loaded"):
        MoEModel.from_pretrained(folder, device="cuda", decode_mode="graph", **options)


TOO_LARGE = {  # for a GPU: the family, its config, and the one field that is as large as can be, or larger
    "qwen3_moe-hidden": ({"head_dim": 8}, "hidden_size", 32768, "hidden size"),
    "qwen3_moe-experts": ({}, "num_experts", 1023, "number of experts"),
    "qwen3_moe-heads": ({}, "head_dim", 256, "head dimension"),
    "deepseek_v3-queries": ({}, "q_lora_rank", 32768, "rank of queries"),
    "deepseek_v2-latent": ({}, "kv_lora_rank", 512, "rank of keys and values"),
    "deepseek_v2-rotated": ({}, "qk_rope_head_dim", 128, "number of rotated dimensions"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_sizes_that_only_cpus_compute_are_refused_for_a_gpu(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duoserve.loading.placement, "resolve_device", torch.device)
    changes, field, most, name = TOO_LARGE[case]
    model_type = case.partition("-")[0]
    (family,) = (family for family in FAMILIES if family.model_type == model_type)
    raw = SMALL | dict(CASES[model_type].base) | changes

    def place(number: int, device: str) -> Placement:
        config = family.parse_config(raw | {field: number})
        with opened(folder) as found:
            return Placement.of(replace(found, config=config), EngineConfig(device=device))

    beyond = 2 * most
    assert place(most, "cuda").device.type == "cuda"
    assert place(beyond, "cpu").device.type == "cpu"
    with pytest.raises(ConfigError, match=rf"{name} is {beyond} \(a GPU takes up to {most}\) .*device='cpu'"):
        place(beyond, "cuda")
