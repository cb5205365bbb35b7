"""What a model is (``ModelConfig``) and how it is to be run (``EngineConfig``): frozen, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from duoserve.errors import ConfigError

DECODE_MODES = ("auto", "event", "graph")


class Phase(Enum):
    """The two phases of inference, scheduled apart."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class ModelConfig:
    """An MoE transformer's hyper-parameters in one dialect; a family file maps ``config.json`` to it.

    Sizes count elements (never bytes); ``sliding_window`` counts tokens, None where attention sees all of them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: torch.dtype
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}, but must lie in 1..{self.num_experts}, the number of experts")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly")


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. At most one of ``expert_memory``, ``expert_slots`` and ``memory`` may be set.

    Memory sizes are bytes; ``host_memory`` None means: as the device wants it (on a CPU nothing, its tier is the disk).
    ``expert_slots`` is a count, or a share of all experts such as "25%". ``decode_mode`` says how a GPU's decode steps
    are launched: "event" or "graph", see ``decoding.py``, or "auto".
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

    def __post_init__(self) -> None:
        given = [n for n in ("expert_memory", "expert_slots", "memory") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.decode_mode not in DECODE_MODES:
            raise ConfigError(f"decode_mode={self.decode_mode!r} is not known: use one of {', '.join(DECODE_MODES)}")
        for name in ("max_context", "copy_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
