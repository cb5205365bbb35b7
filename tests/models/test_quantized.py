"""Whole quantized models against the same in floats, run by transformers; what is refused of them, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from duoserve import CheckpointError, ConfigError, MoEModel
from duoserve.errors import CopyError
from duoserve.experts.shards import INDEX_FILE
from duoserve.loading import placement
from duoserve.models.described import described
from duoserve.models.gpu_support import cpu_only
from duoserve.models.opened import opened
from tests.helpers import encoders
from tests.helpers.checkpoints import reference_logits
from tests.helpers.toys import greedy, toy_prompt
from tests.models.cases.case import SINGLE
from tests.models.cases.quantized import AWQ, CASES, GPTQ, QuantizedCase
from tests.models.test_mixtral_parity import check_reference, relative_error

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


@pytest.mark.parametrize("weights", ["there", "elsewhere"])
@pytest.mark.parametrize("name", ["qwen3_moe-awq", "qwen3_moe-gptq"])
def test_quantized_tensors_of_which_the_config_says_nothing_are_named(name: str, weights: str, tmp_path: Path) -> None:
    """AutoGPTQ and AutoAWQ once wrote quantization_config as a file of its own, which transformers does not read."""
    quantized, _ = replace(CASES[name], shards=2).save(tmp_path)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (quantized / "config.json").write_text(json.dumps(config))
    if weights == "elsewhere":
        for file in quantized.glob("*.safetensors"):
            file.unlink()
    remedy = r"put the object that is in quantize_config\.json or quant_config\.json into config\.json"
    with pytest.raises(CheckpointError, match=rf"\.qweight' is quantized, but config\.json has no .*; {remedy}"):
        MoEModel.from_pretrained(quantized)


def test_symmetric_awq_has_its_zero_points_in_the_file_too(tmp_path: Path) -> None:
    """AutoRound writes 8 for each of them, and AutoAWQ and vLLM read them whatever zero_point says."""
    encode = partial(encoders.awq, group=32, symmetric=True)
    case = replace(
        CASES["qwen3_moe-awq"], section=AWQ | {"zero_point": False}, encode=lambda module, weight_ND: encode(weight_ND)
    )
    quantized, plain = case.save(tmp_path)
    with MoEModel.from_pretrained(quantized, dtype="float32") as model:
        assert relative_error(model.forward(PROMPT), reference_logits(plain, PROMPT)) <= 1e-5


@pytest.mark.parametrize("weights", ["there", "elsewhere"])
@pytest.mark.parametrize("name", ["qwen3_moe-fp8", "qwen3_moe-gptq", "qwen3_moe-gptq-ordered", "gpt_oss-mxfp4"])
def test_a_layer_whose_experts_are_not_quantized_is_named(name: str, weights: str, tmp_path: Path) -> None:
    """However the config says it: each program has another way to name modules."""
    case = CASES[name]
    skips = {"modules_to_not_convert": ["model.layers.0."]}
    quantized, _ = replace(case, section=case.section | skips, skipped=r"layers\.0\.", shards=2).save(tmp_path)
    if weights == "elsewhere":
        for file in quantized.glob("*.safetensors"):
            file.unlink()
    expert = r"'model\.layers\.0\.mlp\.experts\.[^']*' and .* more are in floats"
    with pytest.raises(CheckpointError, match=rf"{expert}, .* take a checkpoint that has all experts quantized"):
        MoEModel.from_pretrained(quantized)
