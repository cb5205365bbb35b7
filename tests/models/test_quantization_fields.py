"""What a ``quantization_config`` means, and what of it is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config

from duoserve import ConfigError, MoEModel
from duoserve.architecture import Quantization
from duoserve.models.registry import family_of
from tests.models.cases.case import SINGLE
from tests.models.cases.quantized import AWQ, FP8, GPTQ

WIDE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
GPTQMODEL = {  # what GPTQModel has written at the top level over the years
    "hyb_act": False,
    "v2": False,
    "v2_alpha": 0.25,
    "v2_memory_device": "auto",
    "offload_to_disk": True,
    "offload_to_disk_path": "./gptqmodel_offload/x/",
    "pack_impl": "cpu",
    "fail_safe": False,
    "adapter": None,
    "rotation": None,
    "gptaq": False,
    "gptaq_alpha": 0.25,
    "gptaq_memory_device": "auto",
    "mock_quantization": False,
    "buffered_fwd": False,
    "hessian_chunk_size": None,
    "use_marlin": False,
}
AUTOROUND = {  # what AutoRound 0.5 to 0.14 has written beside what GPTQ's and AWQ's own programs write
    "act_bits": 16,
    "act_data_type": "int",
    "act_dynamic": True,
    "act_group_size": 128,
    "act_sym": True,
    "amp": True,
    "autoround_version": "0.5.1",
    "batch_size": 8,
    "data_type": "int",
    "enable_minmax_tuning": True,
    "enable_norm_bias_tuning": False,
    "enable_quanted_input": True,
    "gradient_accumulate_steps": 1,
    "iters": 1000,
    "low_gpu_mem_usage": True,
    "lr": 0.001,
    "minmax_lr": 0.001,
    "n_samples": 512,
    "nsamples": 512,
    "provider": "auto-round",
    "quant_block_list": None,
    "regex_config": {},
    "rotation_configs": [],
    "scale_dtype": "torch.float16",
    "seqlen": 2048,
    "static_attention_dtype": None,
    "static_attention_granularity": "tensor",
    "static_kv_dtype": None,
    "static_kv_granularity": "tensor",
    "super_bits": None,
    "super_group_size": None,
    "supported_types": ["Linear"],
    "to_quant_block_names": "model.layers",
    "train_bs": 8,
}
OF_AWQ, OF_GPTQ = Quantization("awq", 32), Quantization("gptq", 32, symmetric=False, less_one=True)
MEANT: dict[str, tuple[dict[str, Any], Quantization]] = {
    "gptqmodel's gptq": (GPTQ | GPTQMODEL, OF_GPTQ),
    "gptqmodel's awq": (AWQ | GPTQMODEL, OF_AWQ),
    "autoround's gptq": (GPTQ | AUTOROUND, OF_GPTQ),
    "autoround's awq": (AWQ | AUTOROUND | {"sym": True, "zero_point": False}, OF_AWQ),
    "modules that gptq leaves out": (GPTQ | {"dynamic": {"-:.*self_attn": {}}}, OF_GPTQ),
    "modules that awq leaves out": (AWQ | {"dynamic": {"-:.*self_attn": {}}}, OF_AWQ),
    "an order": (GPTQ | {"desc_act": True}, replace(OF_GPTQ, ordered=True)),
    "no order of one group": (GPTQ | {"desc_act": True, "group_size": -1}, replace(OF_GPTQ, group=0)),
    "awq's format twice": (AWQ | {"checkpoint_format": "gemm", "format": "gemm"}, OF_AWQ),
    "awq's format alone": ({n: AWQ[n] for n in AWQ if n != "version"} | {"checkpoint_format": "GEMM"}, OF_AWQ),
    "transformers' fp8": (json.loads(json.dumps(FineGrainedFP8Config().to_dict())), Quantization("fp8")),
    "fp8, decoded there": (FP8 | {"dequantize": True}, Quantization("fp8")),
}


@pytest.mark.parametrize("name", MEANT)
def test_a_quantization_means_what_its_program_means(name: str) -> None:
    section, meant = MEANT[name]
    raw = {"model_type": "qwen3_moe", **WIDE, "quantization_config": section}
    assert family_of(raw).parse_config(raw).quantization == meant


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no object": ("qwen3_moe", {"quantization_config": 4}, "quantization_config is 4; it must be an object"),
    "method": ("qwen3_moe", AWQ | {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; supported: 'awq'"),
    "compressed": (
        "qwen3_moe",
        {"quant_method": "compressed-tensors"},
        "'compressed-tensors'; supported: 'awq', 'fp8'",
    ),
    "mxfp4 of qwen": ("qwen3_moe", {"quant_method": "mxfp4"}, "quant_method is 'mxfp4'; supported: 'awq', 'fp8'"),
    "fp8 of gpt-oss": ("gpt_oss", FP8, "quant_method is 'fp8'; supported: 'mxfp4'"),
    "granite": ("granitemoe", FP8, "supported in this family: weights in bfloat16, float16 or float32"),
    "odd field": (
        "qwen3_moe",
        FP8 | {"rotation": 3},
        "quantization_config: rotation is 3; what it says of the weights is not known",
    ),
    "fmt": ("qwen3_moe", FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'; supported: 'e4m3'"),
    "static": (
        "qwen3_moe",
        FP8 | {"activation_scheme": "static"},
        "activation_scheme is 'static'; supported: 'dynamic'",
    ),
    "blocks": (
        "qwen3_moe",
        FP8 | {"weight_block_size": [64, 64]},
        r"weight_block_size is \[64, 64\]; supported: \[128",
    ),
    "no blocks": ("qwen3_moe", FP8 | {"weight_block_size": None}, "weight_block_size is None; supported"),
    "float experts": (
        "qwen3_moe",
        FP8 | {"modules_to_not_convert": ["model.layers.0.mlp.experts.0"]},
        "modules_to_not_convert is .*; routed experts that are not quantized",
    ),
    "skips no list": (
        "qwen3_moe",
        FP8 | {"modules_to_not_convert": "gate"},
        "modules_to_not_convert is 'gate'; it must",
    ),
    "more than matrices": (
        "qwen3_moe",
        FP8 | {"modules_to_convert": ["model.embed_tokens"]},
        "modules_to_convert is .*; supported: null",
    ),
    "dequantize": ("qwen3_moe", FP8 | {"dequantize": "no"}, "dequantize is 'no'; it must be true or false"),
    "awq bits": ("qwen3_moe", AWQ | {"bits": 8}, r"bits is 8; it must be an integer in 4\.\.4"),
    "awq version": ("qwen3_moe", AWQ | {"version": "gemv"}, "version is 'gemv'; supported: 'gemm'"),
    "awq format": (
        "qwen3_moe",
        AWQ | {"checkpoint_format": "gemv_fast"},
        "checkpoint_format is 'gemv_fast'; supported",
    ),
    "awq zero-point": ("qwen3_moe", AWQ | {"zero_point": "no"}, "zero_point is 'no'; it must be true or false"),
    "awq order": ("qwen3_moe", AWQ | {"desc_act": True}, "desc_act is True; supported: false"),
    "awq dynamic": (
        "qwen3_moe",
        AWQ | {"dynamic": {".*down": {"bits": 8}}},
        "dynamic is .*; supported: rules that leave",
    ),
    "activations": ("qwen3_moe", GPTQ | {"act_bits": 8}, r"act_bits is 8; it must be an integer in 16\.\.32"),
    "codes in floats": ("qwen3_moe", AWQ | {"data_type": "mx_fp"}, "data_type is 'mx_fp'; supported: 'int'"),
    "scales of scales": ("qwen3_moe", GPTQ | {"super_bits": 6}, "super_bits is 6; supported: null"),
    "rotations": ("qwen3_moe", GPTQ | {"rotation_configs": [{"block_size": 32}]}, "rotation_configs is .*: null"),
    "other bits": ("qwen3_moe", AWQ | {"regex_config": {"q_proj": {"bits": 8}}}, "regex_config is .*; supported: null"),
    "groups of 16": (
        "qwen3_moe",
        AWQ | {"group_size": 16},
        "group_size is 16; of an expert of 64 x 32 it leaves no groups",
    ),
    "group of none": ("qwen3_moe", GPTQ | {"group_size": 0}, "group_size is 0; supported: -1 and multiples of 32"),
    "no group": ("qwen3_moe", {"quant_method": "gptq", "bits": 4}, "group_size is absent; it must be an integer"),
    "gptq bits": ("qwen3_moe", GPTQ | {"bits": 3}, r"bits is 3; it must be an integer in 4\.\.4"),
    "marlin": (
        "qwen3_moe",
        GPTQ | {"checkpoint_format": "marlin"},
        "checkpoint_format is 'marlin'; supported: 'gptq', 'g",
    ),
    "new name": ("qwen3_moe", GPTQ | {"format": "marlin"}, "format is 'marlin'; supported: 'gptq', 'gptq_v2'"),
    "is marlin": ("qwen3_moe", GPTQ | {"is_marlin_format": True}, "is_marlin_format is True; supported: false"),
    "dynamic": (
        "qwen3_moe",
        GPTQ | {"dynamic": {"+:.*down": {"bits": 8}}},
        "dynamic is .*; supported: rules that leave",
    ),
    "adapter": ("qwen3_moe", GPTQ | {"adapter": {"rank": 8}}, "adapter is {'rank': 8}; supported: null"),
    "rotation": ("qwen3_moe", AWQ | {"rotation": "hadamard"}, "rotation is 'hadamard'; supported: null"),
    "wide words": ("qwen3_moe", GPTQ | {"pack_dtype": "int64"}, "pack_dtype is 'int64'; supported: 'int32'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_quantization_that_is_not_supported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """The config alone decides, before any tensor is looked for."""
    model_type, section, message = REFUSED[name]
    config = {"model_type": model_type, **WIDE, "quantization_config": section.get("quantization_config", section)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match=f"quantization_config.*{message}|{message}"):
        MoEModel.from_pretrained(tmp_path)


def test_sizes_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt_oss",
        **WIDE,
        "intermediate_size": 40,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match="groups of 32 do not divide an expert of 64 x 40"):
        MoEModel.from_pretrained(tmp_path)
