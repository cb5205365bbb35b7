"""Checkpoints for the loading bench: layers of published models at their real sizes, full of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from duoserve.experts.checkpoint import FLOATS
from duoserve.experts.formats.codes import StoredTensor
from duoserve.experts.shards import CONFIG_FILE, INDEX_FILE
from duoserve.models.registry import family_of
from duoserve.models.stored import by_convention, stored_bytes, stored_tensors

CONFIGS = Path(__file__).resolve().parents[2] / "duoserve" / "assets" / "configs"
VOCAB = 4096  # of the embeddings, which a loader has no trouble with
GROUP = 128
WEIGHT_STD = 0.02
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq"}


@dataclass(frozen=True)
class Case:
    """``layers`` of ``model``, one of CONFIGS, in a format; ``quantize`` as of ``duoserve pack``."""

    name: str
    model: str
    layers: int
    quantization: Mapping[str, Any] | None = None
    quantize: str | None = None


CASES = (
    Case("bf16", "mixtral-8x7b", 1),
    Case("bf16, small experts", "qwen3-30b-a3b", 2),
    Case("fp8", "qwen3-30b-a3b", 4, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    Case("AWQ", "mixtral-8x7b", 3, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    Case("GPTQ", "mixtral-8x7b", 3, GPTQ | {"desc_act": False}),
    Case("GPTQ, ordered", "mixtral-8x7b", 3, GPTQ | {"desc_act": True}),
    Case("MXFP4", "gpt-oss-20b", 5, {"quant_method": "mxfp4"}),
    Case("bf16 made int8", "mixtral-8x7b", 1, quantize="int8"),
    Case("bf16 made int4", "mixtral-8x7b", 1, quantize="int4"),
)


def make_checkpoint(case: Case, folder: Path, shard_bytes: int, small: bool) -> int:
    """Writes config.json, the index and shards of about ``shard_bytes``; says how many bytes the largest has.

    ``small``: experts of a size for a test.
    """
    raw = _config(case, small)
    family = family_of(raw)
    config = family.parse_config(raw)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    files: dict[str, str] = {}
    largest = 0
    for number, shard in enumerate(_shards(stored_tensors(family, config, by_convention(config)), shard_bytes)):
        file = folder / f"model-{number:05}.safetensors"
        save_file({name: _random(name, tensor, case) for name, tensor in shard.items()}, file)
        files |= dict.fromkeys(shard, file.name)
        largest = max(largest, file.stat().st_size)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    return largest


def _config(case: Case, small: bool) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((CONFIGS / case.model / CONFIG_FILE).read_text())
    raw |= {"num_hidden_layers": case.layers, "vocab_size": VOCAB, "quantization_config": case.quantization}
    if small:
        raw |= SMALL | ({"moe_intermediate_size": SMALL["intermediate_size"]} if "moe_intermediate_size" in raw else {})
    return raw


def _shards(stored: Mapping[str, StoredTensor], shard_bytes: int) -> Iterator[dict[str, StoredTensor]]:
    """Tensors in their order; a shard is full when the next one would make it larger than asked."""
    shard: dict[str, StoredTensor] = {}
    filled = 0
    for name, tensor in stored.items():
        nbytes = stored_bytes(tensor, torch.bfloat16)
        if shard and filled + nbytes > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor
        filled += nbytes
    yield shard


def _random(name: str, tensor: StoredTensor, case: Case) -> Tensor:
    """Any words are codes; features are in groups as large as they should be, in an order that gate and up share."""
    dtype = torch.bfloat16 if tensor.dtypes is FLOATS else tensor.dtypes[0]
    if name.endswith(".g_idx"):
        in_groups = torch.arange(tensor.shape[0], dtype=dtype) // GROUP
        order = torch.randperm(len(in_groups), generator=torch.Generator().manual_seed(0))
        return in_groups[order] if (case.quantization or {})["desc_act"] else in_groups
    if not dtype.is_floating_point:
        return torch.empty(tensor.shape, dtype=dtype).random_()
    return torch.randn(tensor.shape).mul_(WEIGHT_STD).to(dtype)
