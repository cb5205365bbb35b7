"""The registry: which families there are, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from duoserve.errors import ConfigError
from duoserve.models.registry import family_of


@pytest.mark.parametrize("architectures", [{}, {"architectures": None}, {"architectures": ["MixtralForCausalLM"]}])
def test_mixtral_is_known(architectures: dict[str, Any]) -> None:
    assert family_of({"model_type": "mixtral"} | architectures).model_type == "mixtral"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama'; supported: .*mixtral"),
        ({"model_type": ["mixtral"]}, r"model_type is \['mixtral'\]; supported: .*mixtral"),
        ({}, "model_type is absent; supported: .*mixtral"),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForSequenceClassification"]},
            r"architectures is \['Mixtral.*\]; supported: MixtralForCausalLM",
        ),
        ({"model_type": "mixtral", "architectures": "MixtralForCausalLM"}, "architectures is 'Mixtral.*'; supported"),
        ({"model_type": "mixtral", "architectures": []}, r"architectures is \[\]; supported: MixtralForCausalLM"),
        *[
            (
                {"model_type": "deepseek_v3", "auto_map": auto_map},
                "auto_map is .*; code .* is never run; remove the field",
            )
            for auto_map in (
                {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
                {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "mine.Model"},
                {"AutoModel": None},
                ["modeling.DeepseekV3Model"],
                "modeling.Model",
                1,
            )
        ],
    ],
)
def test_unknown_models_are_refused_with_what_is_supported(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family_of(raw)


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_code_that_came_with_the_first_checkpoints_is_passed_over(version: str) -> None:
    """As in DeepSeek's own config.json: transformers has these classes itself by now."""
    auto_map = {
        "AutoConfig": f"configuration_deepseek.Deepseek{version}Config",
        "AutoModel": f"modeling_deepseek.Deepseek{version}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.Deepseek{version}ForCausalLM",
    }
    model_type = f"deepseek_{version.lower()}"
    for named in (auto_map, {}, None):
        assert family_of({"model_type": model_type, "auto_map": named}).model_type == model_type


def test_yarn_stretches_the_positions_that_a_model_knows() -> None:
    """As Qwen3's authors advise for long prompts, whose config.json says 40960 positions with it and without."""
    raw = {"model_type": "qwen3_moe", "max_position_embeddings": 40960}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for scaling, positions in ((None, 40960), (yarn, 131072), (yarn | {"factor": 1.0}, 40960)):
        config = raw | {"rope_scaling": scaling}
        assert family_of(config).parse_config(config).num_positions == positions
