"""Whole quantized models against the same in floats, run by transformers; what is refused of them, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config

from duoserve import CheckpointError, ConfigError, MoEModel
from duoserve.architecture import Quantization
from duoserve.errors import CopyError
from duoserve.experts.shards import INDEX_FILE
from duoserve.loading import placement
from duoserve.models.described import described
from duoserve.models.gpu_support import cpu_only
from duoserve.models.opened import opened
from duoserve.models.registry import family_of
from tests import encoders
from tests.checkpoints import reference_logits
from tests.models.cases.case import SINGLE
from tests.models.cases.quantized import AWQ, CASES, FP8, GPTQ, QuantizedCase
from tests.models.test_mixtral_parity import check_reference, relative_error
from tests.toys import greedy, toy_prompt

PROMPT = toy_prompt(40)
GREEDY = greedy(40)


class Saved(NamedTuple):
    case: QuantizedCase
    quantized: Path
    plain: Path


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    case = CASES[request.param]
    return Saved(case, *case.save(tmp_path_factory.mktemp(request.param)))


def test_logits_and_tokens_equal_those_of_transformers_on_the_decoded_model(saved: Saved) -> None:
    with MoEModel.from_pretrained(saved.quantized, dtype="float32") as model:
        tokens = model.generate(PROMPT, GREEDY).token_ids
        check_reference(saved.plain, PROMPT, tokens, model.forward(PROMPT + tokens))
    assert len(tokens) == 40


@pytest.mark.parametrize("name", ["gpt_oss-mxfp4", "qwen3_moe-fp8"])
def test_transformers_decodes_these_files_to_the_same(name: str, tmp_path: Path) -> None:
    """It has no decoder of int4 on CPUs, and cuts fp8 into even blocks where sizes are no multiples of 128."""
    quantized, plain = CASES[name].save(tmp_path)
    assert torch.equal(reference_logits(quantized, PROMPT), reference_logits(plain, PROMPT))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_policy_and_slot_count_gives_the_same_bits_from_quantized_bytes(
    saved: Saved, dtype: str, tmp_path: Path
) -> None:
    with MoEModel.from_pretrained(saved.quantized, dtype=dtype, policy="resident") as model:
        total, tokens = model.memory.total_experts, model.generate(PROMPT, GREEDY, max_tokens=8).token_ids
        truth_TV = model.forward(PROMPT + tokens)
    segments = sum(-(-nbytes // 256) * 256 for nbytes in saved.case.expert_bytes)
    row_bytes = -(-segments // 4096) * 4096
    for policy in ("on-demand", "duoserve"):
        for slots in (saved.case.top_k + 1, total):
            with MoEModel.from_pretrained(
                saved.quantized, dtype=dtype, policy=policy, expert_slots=slots, cache_dir=tmp_path
            ) as model:
                assert model.generate(PROMPT, GREEDY, max_tokens=8).token_ids == tokens, (policy, slots)
                assert model.stats.bytes.total % row_bytes == 0 < model.stats.bytes.total
                logits_TV = model.forward(PROMPT + tokens)
                assert model.memory.slot_bytes == row_bytes
            assert torch.equal(logits_TV.view(torch.int32), truth_TV.view(torch.int32)), (policy, slots)
    (pack,) = (tmp_path / "packs").glob("*/experts.pack")
    with opened(saved.quantized) as found:
        assert pack.stat().st_size == found.pack_layers * 8 * row_bytes


def test_each_tensor_that_is_missing_mis_shaped_or_no_code_is_named(saved: Saved, tmp_path: Path) -> None:
    with opened(saved.quantized) as found:
        tensors = {name: found.checkpoint.read(name) for name in found.checkpoint.tensors}
    (tmp_path / "config.json").write_bytes((saved.quantized / "config.json").read_bytes())
    marks = ("qweight", "qzeros", "scales", "g_idx", "weight_scale_inv", "_blocks", "_scales")
    names = sorted(
        (name for name in tensors if ".experts." in name), reverse=True
    )  # layers that are skipped come first
    for name in {mark: name for name in names for mark in marks if name.endswith(mark)}.values():
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        cut, other = tensors[name][..., :-1].contiguous(), tensors[name].to(torch.float64)
        for changed, fault in (
            (others, f"'{name}'"),
            (others | {f"{name}x": tensors[name]}, f"'{name}'"),
            (tensors | {f"{name}x": tensors[name].clone()}, f"no place for '{name}x'"),
            (others | {name: cut}, rf"'{name}' has shape \["),
            (others | {name: other}, f"'{name}' has dtype torch.float64; supported are"),
        ):
            save_file(changed, tmp_path / SINGLE)
            with pytest.raises(CheckpointError, match=fault):
                MoEModel.from_pretrained(tmp_path)


PARTS = [("fp8", "weight_scale_inv"), ("fp8", "weight"), ("gptq", "qweight"), ("gptq", "scales")]


@pytest.mark.parametrize(("method", "part"), PARTS)
def test_a_dense_matrix_that_is_there_in_part_is_named(method: str, part: str, tmp_path: Path) -> None:
    quantized, _ = CASES[f"qwen3_moe-{method}"].save(tmp_path)
    name = f"model.layers.0.self_attn.q_proj.{part}"
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    file = quantized / index["weight_map"].pop(name)
    save_file({n: tensor for n, tensor in load_file(file).items() if n != name}, file)
    (quantized / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"what the model needs: '{name}'"):
        MoEModel.from_pretrained(quantized)


def beside_matrices(folder: Path, name: str, value: float) -> None:
    """Gives each quantized matrix in the file that has ``name`` a tensor ``name`` of zeros, or of ``value``."""
    tensors = load_file(folder / SINGLE)
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    added = {f"{module}.{name}": torch.zeros(tensors[f"{module}.scales"].shape[1:]) for module in modules}
    added[min(added)][-1] = value
    save_file(added | tensors, folder / SINGLE)


def test_biases_of_zeros_that_autogptq_wrote_are_passed_over(tmp_path: Path) -> None:
    """Until March 2024, beside each matrix that has none of its own."""
    quantized, plain = replace(CASES["qwen3_moe-gptq"], shards=1).save(tmp_path)
    beside_matrices(quantized, "bias", 0.0)
    with MoEModel.from_pretrained(quantized, dtype="float32") as model:
        assert relative_error(model.forward(PROMPT), reference_logits(plain, PROMPT)) <= 1e-5


@pytest.mark.parametrize(
    ("method", "name", "value", "fault"),
    [
        ("gptq-ordered", "bias", 1e-7, "'model.layers.0.mlp.experts.0.down_proj.bias' is not all zeros"),
        ("gptq-ordered", "bias", float("nan"), "'model.layers.0.mlp.experts.0.down_proj.bias' is not all zeros"),
        ("gptq-ordered", "biases", 0.0, "no place for 'model.layers.0.mlp.experts.0.down_proj.biases'"),
        ("awq", "bias", 0.0, "no place for 'model.layers.0.mlp.down_proj.bias'"),
    ],
)
def test_another_tensor_beside_a_matrix_is_named(
    method: str, name: str, value: float, fault: str, tmp_path: Path
) -> None:
    quantized, _ = CASES[f"qwen3_moe-{method}"].save(tmp_path)
    beside_matrices(quantized, name, value)
    with pytest.raises(CheckpointError, match=fault):
        MoEModel.from_pretrained(quantized)


def test_of_an_index_a_bias_beside_a_matrix_is_believed(tmp_path: Path) -> None:
    """Its values are seen when it is there."""
    quantized, _ = CASES["qwen3_moe-gptq"].save(tmp_path)
    path = quantized / INDEX_FILE
    listed = json.loads(path.read_text())
    files = listed["weight_map"]
    files |= {name.replace("qweight", "bias"): file for name, file in files.items() if name.endswith("qweight")}
    path.write_text(json.dumps(listed))
    for file in quantized.glob("*.safetensors"):
        file.unlink()
    assert described(quantized).source == INDEX_FILE


def test_orders_that_a_row_cannot_hold_are_refused_with_the_expert(tmp_path: Path) -> None:
    quantized, _ = CASES["qwen3_moe-gptq-ordered"].save(tmp_path)
    tensors = load_file(quantized / SINGLE)
    name = "model.layers.2.mlp.experts.5.up_proj.g_idx"
    tensors[name] = tensors[name].roll(1)
    save_file(tensors, quantized / SINGLE)
    with pytest.raises(CopyError, match="expert 2/5: gate and up have features in different orders"):
        MoEModel.from_pretrained(quantized)


def test_an_order_of_activation_is_refused_where_it_has_no_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, _ = CASES["qwen3_moe-gptq-ordered"].save(tmp_path)
    monkeypatch.setattr(placement, "resolve_device", torch.device)
    with pytest.raises(ConfigError, match="ordered by activation runs on CPUs only so far: load it with device='cpu'"):
        MoEModel.from_pretrained(quantized, device="cuda")


def test_one_group_has_no_order_whatever_desc_act_says(tmp_path: Path) -> None:
    case = replace(
        CASES["qwen3_moe-gptq"],
        section=GPTQ | {"desc_act": True, "group_size": -1},
        encode=lambda module, weight_ND: encoders.gptq(weight_ND, group=weight_ND.shape[1]),
    )
    quantized, plain = case.save(tmp_path)
    with opened(quantized) as found:
        assert cpu_only(found.config) is None
    with MoEModel.from_pretrained(quantized, dtype="float32") as model:
        assert relative_error(model.forward(PROMPT), reference_logits(plain, PROMPT)) <= 1e-5


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
OF_AWQ, OF_GPTQ = Quantization("awq", 32), Quantization("gptq", 32, symmetric=False, less_one=True)
MEANT: dict[str, tuple[dict[str, Any], Quantization]] = {
    "gptqmodel's gptq": (GPTQ | GPTQMODEL, OF_GPTQ),
    "gptqmodel's awq": (AWQ | GPTQMODEL, OF_AWQ),
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
    "awq symmetric": ("qwen3_moe", AWQ | {"zero_point": False}, "zero_point is False; supported: true"),
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


WIDE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}


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
