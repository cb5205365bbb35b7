"""Small checkpoints made by the real transformers classes, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import duoserve

BARD = Path(duoserve.__file__).parent / "assets/bard"
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}


def save_mixtral(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
    """A random Mixtral saved by transformers; weights are wide enough that routing and argmax have no near-ties."""
    torch.manual_seed(len(str(sorted(changes))))
    model = MixtralForCausalLM(MixtralConfig(**(SMALL | changes))).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def to_hub_dialect(folder: Path) -> Path:
    """Rewrites config.json as hub files of the years before transformers 5 have it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    path.write_text(json.dumps(config))
    return folder


def reference_logits(folder: Path, token_ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Transformers' logits [T, V], float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


def reference_greedy(folder: Path, token_ids: list[int], count: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """The ``count`` tokens that transformers chooses greedily, end-of-text ignored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(token_ids) :].tolist()
