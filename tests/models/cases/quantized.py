"""Quantized checkpoints of small models, each beside the same model in floats: what transformers is asked about."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import encoders
from tests.helpers.encoders import Encoded
from tests.models.cases import deepseek, gpt_oss, qwen3_moe
from tests.models.cases.case import SINGLE, Case, FamilyCases

EncodeNamed = Callable[[str, Tensor], Encoded]
WIDE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "intermediate_size": 96}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


@dataclass(frozen=True)
class QuantizedCase:
    """``section`` is the quantization_config; ``skipped`` matches modules that stay floats.

    ``expert_bytes`` are those of an expert's segments: w13, its scales and zero-points, w2, its, the order.
    """

    family: FamilyCases
    changes: Mapping[str, Any]
    section: Mapping[str, Any]
    encode: EncodeNamed
    expert_bytes: tuple[int, ...]
    hub: bool = False
    skipped: str = "$^"
    shards: int = 1
    top_k: int = 3

    def save(self, folder: Path) -> tuple[Path, Path]:
        """The quantized checkpoint, and the same in float32."""
        case = Case(self.changes, hub=self.hub, mtp=self.hub)
        quantized, plain = folder / "quantized", folder / "plain"
        replace(self.family, cases={"quantized": case}).save(plain, "quantized")
        tensors, meant = self._encoded(load_file(plain / SINGLE))
        save_file(meant, plain / SINGLE, metadata={"format": "pt"})
        quantized.mkdir()
        config = json.loads((plain / "config.json").read_text()) | {"quantization_config": dict(self.section)}
        (quantized / "config.json").write_text(json.dumps(config))
        save_shards(quantized, tensors, self.shards)
        return quantized, plain

    def _encoded(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Name -> tensor of the quantized checkpoint, and of the plain one."""
        stored: dict[str, Tensor] = {}
        meant = dict(tensors)
        for name, tensor in tensors.items():
            if re.search(self.skipped, name):
                stored[name] = tensor
            elif name.endswith("_proj.weight") or name.endswith("_with_mqa.weight"):
                module = name.removesuffix(".weight")
                encoded = self.encode(module, tensor)
                stored |= {f"{module}.{part}": found for part, found in encoded.tensors.items()}
                meant[name] = encoded.weight_ND
            elif tensor.dim() == 3:  # all experts of a layer, input by output
                each = [self.encode(name, expert_DN.T) for expert_DN in tensor]
                for part in each[0].tensors:
                    stored[f"{name}_{part}"] = torch.stack([encoded.tensors[part] for encoded in each])
                meant[name] = torch.stack([encoded.weight_ND.T for encoded in each])
            else:
                stored[name] = tensor
        return stored, meant


def save_shards(folder: Path, tensors: Mapping[str, Tensor], count: int) -> None:
    """One file, or several with an index."""
    if count == 1:
        save_file(dict(tensors), folder / SINGLE, metadata={"format": "pt"})
        return
    files = {name: f"model-{i % count}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in tensors if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def by_order(module: str, weight_ND: Tensor) -> Encoded:
    """GPTQ with an order for each input: modules side by side have one."""
    seed = zlib.crc32(f"{module.rpartition('.')[0]} {weight_ND.shape[1]}".encode())
    order_D = np.random.default_rng(seed).permutation(weight_ND.shape[1])
    return encoders.gptq(weight_ND, 32, version=2, order_D=order_D)


def unnamed(encode: Callable[[Tensor], Encoded]) -> EncodeNamed:
    """An encoder that does the same to every module."""
    return lambda module, weight_ND: encode(weight_ND)


CASES: dict[str, QuantizedCase] = {
    "deepseek_v3-fp8": QuantizedCase(
        family=deepseek.V3,
        changes={"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 200, "q_lora_rank": 140},
        section=FP8,
        encode=unnamed(encoders.fp8),
        expert_bytes=(2 * 136 * 160, 4 * 2 * 4, 136 * 160, 2 * 2 * 4),
        hub=True,
    ),
    "qwen3_moe-fp8": QuantizedCase(
        family=qwen3_moe.CASES,
        changes=WIDE | {"attention_bias": True},
        section=FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
        encode=unnamed(partial(encoders.fp8, scale_dtype=torch.bfloat16)),
        expert_bytes=(2 * 64 * 32, 2 * 4, 64 * 32, 4),
        skipped="k_proj",
        shards=2,
    ),
    "qwen3_moe-awq": QuantizedCase(
        family=qwen3_moe.CASES,
        changes=WIDE | {"mlp_only_layers": [0]},
        section=AWQ | {"modules_to_not_convert": ["mlp.gate"]},
        encode=unnamed(partial(encoders.awq, group=32)),
        expert_bytes=(64 * 64 // 2, 2 * 64 * 3, 64 * 32 // 2, 64 * 3),
    ),
    "qwen3_moe-gptq": QuantizedCase(
        family=qwen3_moe.CASES,
        changes=WIDE | {"attention_bias": True},
        section=GPTQ | {"sym": True, "checkpoint_format": "gptq", "meta": {"quantizer": ["x:1"]}},
        encode=unnamed(partial(encoders.gptq, group=32, symmetric=True)),
        expert_bytes=(64 * 64 // 2, 2 * 64 * 3, 64 * 32 // 2, 64 * 3),
        skipped="layers.1.self_attn",
        shards=3,
    ),
    "qwen3_moe-gptq-ordered": QuantizedCase(
        family=qwen3_moe.CASES,
        changes=WIDE | {"mlp_only_layers": [1]},
        section=GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2"},
        encode=by_order,
        expert_bytes=(64 * 64 // 2, 2 * 64 * 3, 64 * 32 // 2, 64 * 3, 64 * 4),
    ),
    "gpt_oss-mxfp4": QuantizedCase(
        family=gpt_oss.CASES,
        changes={"hidden_size": 96, "intermediate_size": 64},
        section={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        encode=unnamed(encoders.mxfp4),
        expert_bytes=(2 * 64 * 96 // 2, 2 * 64 * 3, 64 * 96 // 2, 96 * 2),
        skipped="self_attn",
    ),
}
