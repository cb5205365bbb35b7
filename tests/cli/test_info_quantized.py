"""``duoserve info`` of quantized checkpoints: the format, and the bytes that experts have."""

import json

import pytest

from tests.models.cases.quantized import CASES

NAMES = {
    "deepseek_v3-fp8": "fp8, blocks of 128 x 128",
    "qwen3_moe-awq": "awq int4, groups of 32",
    "qwen3_moe-gptq-ordered": "gptq int4, groups of 32, ordered by activation",
    "gpt_oss-mxfp4": "mxfp4, groups of 32",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_named_and_bytes_are_those_of_the_files(name, duoserve, tmp_path):
    case = CASES[name]
    quantized, _ = case.save(tmp_path)
    report = json.loads(duoserve("info", quantized, "--json").out)
    assert report["architecture"]["quantization"] == NAMES[name]
    weights = quantized / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    total = sum(report["bytes_by_part"].values())
    # Layers that guess further tokens are there, and no part of the model.
    assert total == weights.stat().st_size - 8 - header or (case.hub and total < weights.stat().st_size)
    segments = sum(-(-nbytes // 256) * 256 for nbytes in case.expert_bytes)
    assert report["slot_bytes"] == -(-segments // 4096) * 4096
    lines = [" ".join(line.split()) for line in duoserve("info", quantized).out.splitlines()]
    assert f"quantization {NAMES[name]}" in lines
    assert any(
        f"{report['expert_bytes']} bytes each on disk, {report['slot_bytes']} in a slot" in line for line in lines
    )


@pytest.mark.parametrize("name", ["qwen3_moe-awq", "gpt_oss-mxfp4"])
def test_a_config_is_enough(name, duoserve, tmp_path):
    """Of a hub id whose weights are elsewhere: the sizes are those of what such checkpoints usually have quantized."""
    quantized, _ = CASES[name].save(tmp_path)
    whole = json.loads(duoserve("info", quantized, "--json").out)
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())
    assert json.loads(duoserve("info", tmp_path, "--json").out) | {"source": ""} == whole | {"source": ""}
