"""The models that are served without a checkpoint: config.json, random dense weights, and a card of their routing."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.errors import ConfigError
from duoserve.experts.layout import ExpertLayout
from duoserve.models.family import Family
from duoserve.models.registry import family_of
from duoserve.models.tensors import ReadTensor, TensorNeed
from duoserve.planning.formats import layout_in
from duoserve.planning.model_cards import CONFIGS
from duoserve.traces.synthetic import CARDS, RoutingCard

EMBEDDING = "embed_tokens"
BF16 = "bf16"  # the format of the checkpoints


class Unavailable(Exception):
    """What was asked for cannot be measured; the message says why."""


@dataclass(frozen=True)
class Wired:
    """A model that can be built: its family, what its config.json means, and the ``format`` of its experts."""

    family: Family
    config: ModelConfig
    format: str

    @property
    def layout(self) -> ExpertLayout:
        """The bytes of an expert."""
        return layout_in(self.config, self.format, self.config.dtype)

    @property
    def dense_needs(self) -> dict[str, TensorNeed]:
        """Every tensor but the routed experts'."""
        return self.family.dense_needs(self.config)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense weights."""
        return self.family.dense_bytes(self.config, self.config.dtype)

    @property
    def active_dense_elements(self) -> int:
        """Dense weights that every token is multiplied by: all matrices but the embedding table."""
        shapes = {name: need.shape for name, need in self.dense_needs.items()}
        return sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and EMBEDDING not in name)

    def reader(self, device: torch.device) -> ReadTensor:
        """Random dense tensors by name, the same for the same name: norms are ones, matrices keep a row's size."""
        needs = self.dense_needs

        def read(name: str, dtype: torch.dtype | None = None) -> Tensor:
            shape, dtype = needs[name].shape, dtype or self.config.dtype
            if len(shape) == 1:
                return torch.full(shape, float("norm" in name), dtype=dtype, device=device)
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            made = torch.empty(shape, dtype=dtype, device=device)
            return made.normal_(0.0, shape[-1] ** -0.5, generator=generator)

        return read


@dataclass(frozen=True)
class ServeModel:
    """A published config.json, and a card of the model's routing."""

    name: str
    raw: dict[str, Any]
    card: RoutingCard

    def wired(self, format: str = BF16) -> Wired:
        """With the family that knows it, and experts in ``format``; Unavailable where there is none."""
        try:
            family = family_of(self.raw)
            return Wired(family, family.parse_config(self.raw), format)
        except ConfigError as error:
            raise Unavailable(f"no family: {error}") from error


def _published(name: str) -> ServeModel:
    """By the name of its cards, in any case."""
    card = name.lower()
    return ServeModel(name, json.loads((CONFIGS / card / "config.json").read_text()), CARDS[card])


MODELS = {name: _published(name) for name in ("Qwen3-30B-A3B", "Mixtral-8x7B", "DeepSeek-V2-Lite")}

_TINY_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
    "head_dim": 16,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


def tiny(model: ServeModel) -> ServeModel:
    """The same routing over experts so small that a CPU serves them in a moment."""
    num_layers = _TINY_SIZES["num_hidden_layers"] - model.raw.get("first_k_dense_replace", 0)
    return replace(model, raw=_shrunk(model.raw), card=replace(model.card, num_layers=num_layers))


def _shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    small = {name: _TINY_SIZES.get(name, value) for name, value in raw.items()}
    if raw["num_key_value_heads"] == raw["num_attention_heads"]:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small
