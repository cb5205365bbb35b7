"""The models that are served without a checkpoint: config.json, random dense weights, and a card of their routing."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from duoserve.config import ModelConfig
from duoserve.errors import ConfigError
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.models.registry import Family, family_of
from duoserve.scheduling.synthetic import CARDS, RoutingCard

EMBEDDING = "embed_tokens"

_COMMON: dict[str, Any] = {"dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
_MIXTRAL = _COMMON | {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
_QWEN3 = _COMMON | {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
_QWEN3_AS_MIXTRAL = {name: value for name, value in _QWEN3.items() if name in _MIXTRAL} | {
    "model_type": "mixtral",
    "head_dim": 128,
    "intermediate_size": 768,
    "num_local_experts": 128,
}
_DEEPSEEK = _COMMON | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}


class Unavailable(Exception):
    """What was asked for cannot be measured; the message says why."""


@dataclass(frozen=True)
class Wired:
    """A model that can be built: its family, what its config.json means, and in which way it is not the original."""

    family: Family
    config: ModelConfig
    note: str = ""

    @property
    def layout(self) -> ExpertLayout:
        """The bytes of an expert."""
        config = self.config
        return ExpertLayout(config.dtype, config.hidden_size, config.expert_intermediate_size)

    @property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor but the routed experts'."""
        config, shapes = self.config, dict(self.family.tensor_shapes(self.config))
        for expert in (ExpertId(n, e) for n in range(config.num_layers) for e in range(config.num_experts)):
            for name in self.family.expert_names(expert):
                shapes.pop(name, None)
        return shapes

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense weights."""
        return sum(map(prod, self.dense_shapes.values())) * self.config.dtype.itemsize

    @property
    def active_dense_elements(self) -> int:
        """Dense weights that every token is multiplied by: all matrices but the embedding table."""
        return sum(prod(s) for name, s in self.dense_shapes.items() if len(s) == 2 and EMBEDDING not in name)

    def reader(self, device: torch.device) -> Callable[[str], Tensor]:
        """Random dense tensors by name, the same for the same name: norms are ones, matrices keep a row's size."""
        shapes = self.dense_shapes

        def read(name: str) -> Tensor:
            shape = shapes[name]
            if len(shape) == 1:
                return torch.full(shape, float("norm" in name), dtype=self.config.dtype, device=device)
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            made = torch.empty(shape, dtype=self.config.dtype, device=device)
            return made.normal_(0.0, shape[-1] ** -0.5, generator=generator)

        return read


@dataclass(frozen=True)
class ServeModel:
    """``stand_in`` is a config of the same sizes in a family that there is, used while there is none for ``raw``."""

    name: str
    raw: dict[str, Any]
    card: RoutingCard
    stand_in: dict[str, Any] | None = None
    stand_in_note: str = ""

    def wired(self) -> Wired:
        """With the family that knows it; Unavailable where there is none."""
        try:
            return _wired(self.raw)
        except ConfigError as error:
            if self.stand_in is None:
                raise Unavailable(f"no family: {error}") from error
        return replace(_wired(self.stand_in), note=self.stand_in_note)


def _wired(raw: dict[str, Any]) -> Wired:
    family = family_of(raw)
    return Wired(family, family.parse_config(raw))


MODELS = {
    model.name: model
    for model in (
        ServeModel(
            "Qwen3-30B-A3B",
            _QWEN3,
            CARDS["qwen3-30b-a3b"],
            _QWEN3_AS_MIXTRAL,
            "wired as a Mixtral of its sizes, without the norms of queries and keys",
        ),
        ServeModel("Mixtral-8x7B", _MIXTRAL, CARDS["mixtral-8x7b"]),
        ServeModel("DeepSeek-V2-Lite", _DEEPSEEK, CARDS["deepseek-v2-lite"]),
    )
}

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
    stand_in = model.stand_in and _shrunk(model.stand_in)
    num_layers = _TINY_SIZES["num_hidden_layers"] - model.raw.get("first_k_dense_replace", 0)
    return replace(model, raw=_shrunk(model.raw), stand_in=stand_in, card=replace(model.card, num_layers=num_layers))


def _shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    small = {name: _TINY_SIZES.get(name, value) for name, value in raw.items()}
    if raw["num_key_value_heads"] == raw["num_attention_heads"]:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small
