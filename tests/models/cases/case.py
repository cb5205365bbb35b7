"""What a family's table of test cases holds, and how a case becomes a checkpoint that transformers saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "pad_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Case:
    """``changes`` are to the family's config; ``hub`` rewrites config.json as the hub has it, renaming ``hub_names``.

    ``mtp`` adds tensors of a layer behind the last, as checkpoints with multi-token prediction have them.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    hub: bool = False
    hub_names: Mapping[str, str] = field(default_factory=dict)
    mtp: bool = False
    shard: str = "5GB"


@dataclass(frozen=True)
class FamilyCases:
    """``base`` is a small config; ``hard`` the case that is run under every policy; ``refused`` config -> message.

    ``top_k`` and ``experts`` (of all layers together) are those of ``hard``.
    """

    model_type: str
    base: Mapping[str, Any]
    cases: Mapping[str, Case]
    hard: str
    top_k: int
    experts: int
    refused: Mapping[str, tuple[Mapping[str, Any], str]]

    def save(self, folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
        """The checkpoint of a case; weights are wide enough that routing and argmax have no near-ties."""
        case = self.cases[name]
        torch.manual_seed(len(str(sorted(case.changes))))
        config = AutoConfig.for_model(self.model_type, **(SMALL | dict(self.base) | dict(case.changes)))
        model = AutoModelForCausalLM.from_config(config)
        _roughen(model)
        model.to(dtype).save_pretrained(folder, max_shard_size=case.shard)
        if case.hub:
            to_hub_dialect(folder, case.hub_names)
        if case.mtp:
            _add_mtp_layer(folder, config.num_hidden_layers)
        return folder


def to_hub_dialect(folder: Path, names: Mapping[str, str]) -> None:
    """Rewrites config.json as files of the years before transformers 5 have it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    for ours, theirs in names.items():
        config[theirs] = config.pop(ours)
    path.write_text(json.dumps(config))


@torch.no_grad()
def _roughen(model: torch.nn.Module) -> None:
    """Biases and norms begin as zeros and ones, with which a model that forgets them would pass."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in name or "norm" in name:
            tensor.add_(torch.randn_like(tensor), alpha=0.2)


def _add_mtp_layer(folder: Path, layer: int) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[f"model.layers.{layer}.eh_proj.weight"] = torch.randn(32, 64)
    tensors[f"model.layers.{layer}.mlp.experts.0.gate_proj.weight"] = torch.randn(12, 32)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
