"""What a model is (``ModelConfig``) and how it is to be run (``EngineConfig``): frozen, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from duoserve.architecture import Blocks, Quantization
from duoserve.byte_sizes import parse_bytes
from duoserve.errors import ConfigError
from duoserve.number_checks import checked_integer

DECODE_MODES = ("auto", "event", "graph", "compiled")
QUANTIZE = ("bf12", "int8", "int4")


class Phase(StrEnum):
    """The two phases of inference, scheduled apart."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class ModelConfig:
    """An MoE transformer's hyper-parameters in one dialect; a family file maps ``config.json`` to it.

    Sizes count elements (never bytes). ``dtype`` is that of all weights that are not quantized.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: torch.dtype
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    blocks: Blocks
    quantization: Quantization | None = None

    @property
    def num_positions(self) -> int:
        """Positions that the model knows; with YaRN, the positions that it is stretched to."""
        yarn = self.blocks.rope.yarn
        stretched = 0 if yarn is None else int(yarn.factor * yarn.original_context)
        return max(self.max_position_embeddings, stretched)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have routed experts, in ascending order."""
        return self.blocks.moe.layers

    @property
    def num_experts(self) -> int:
        """Routed experts of one layer."""
        return self.blocks.moe.router.num_experts

    @property
    def top_k(self) -> int:
        """Routed experts that a token takes in one layer."""
        return self.blocks.moe.router.top_k

    @property
    def expert_intermediate_size(self) -> int:
        """Width of a routed expert."""
        return self.blocks.moe.expert_intermediate_size


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run; ``MoEModel.from_pretrained`` says what each option means.

    Here memory sizes are bytes, and ``host_memory`` None means its "auto". Raises ConfigError for options that exclude
    each other, and for values of another kind or out of range.
    """

    device: str = "auto"
    dtype: str = "auto"
    expert_memory: int | None = None
    expert_slots: int | str | None = None
    memory: int | None = None
    host_memory: int | None = None
    max_context: int | None = None
    copy_threads: int = 2
    decode_mode: str = "auto"
    quantize: str | None = None
    invariant: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("expert_memory", "expert_slots", "memory") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other: give one of them")
        _check_kind("device", self.device, str, "text such as 'auto' or 'cpu'")
        _check_kind("dtype", self.dtype, str, "text such as 'auto' or 'bfloat16'")
        _check_kind("invariant", self.invariant, bool, "True or False")
        if self.decode_mode not in DECODE_MODES:
            raise ConfigError(f"decode_mode={self.decode_mode!r} is not known: use one of {', '.join(DECODE_MODES)}")
        if self.invariant and self.decode_mode == "compiled":
            raise ConfigError("invariant=True multiplies row by row, which decode_mode='compiled' does not: use 'auto'")
        if self.quantize is not None and self.quantize not in QUANTIZE:
            raise ConfigError(f"quantize={self.quantize!r} is not known: use one of {', '.join(QUANTIZE)}, or None")
        for name in ("expert_memory", "memory", "host_memory", "max_context"):
            if (value := getattr(self, name)) is not None:
                lowest = 1 if name == "max_context" else 0
                object.__setattr__(self, name, checked_integer(ConfigError, name, value, lowest))
        object.__setattr__(self, "copy_threads", checked_integer(ConfigError, "copy_threads", self.copy_threads, 1))

    @classmethod
    def of(
        cls,
        *,
        expert_memory: int | str | None = None,
        memory: int | str | None = None,
        host_memory: int | str | None = "auto",
        **others: Any,
    ) -> EngineConfig:
        """A config from sizes as ``parse_bytes`` takes them, and ``others`` as they are; raises the errors of both."""
        return cls(
            expert_memory=_given_bytes(expert_memory),
            memory=_given_bytes(memory),
            host_memory=None if host_memory == "auto" else _given_bytes(host_memory),
            **others,
        )


def _given_bytes(size: int | str | None) -> int | None:
    return None if size is None else parse_bytes(size)


def _check_kind(name: str, value: object, kind: type, called: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}, but must be {called}")
