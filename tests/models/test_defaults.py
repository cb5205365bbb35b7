"""A field that config.json does not have means what it means to transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from duoserve.errors import ConfigError
from duoserve.models import deepseek, glm4_moe, gpt_oss, granite_moe, mixtral, olmoe, qwen2_moe, qwen3_moe
from duoserve.models.family import Family
from duoserve.models.registry import FAMILIES
from tests.models.cases import FAMILIES as CASES
from tests.models.cases.case import SMALL

DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": mixtral.DEFAULTS,
    "qwen3_moe": qwen3_moe.DEFAULTS,
    "qwen2_moe": qwen2_moe.DEFAULTS,
    "olmoe": olmoe.DEFAULTS,
    "deepseek_v2": deepseek.DEFAULTS_V2,
    "deepseek_v3": deepseek.DEFAULTS_V3,
    "glm4_moe": glm4_moe.DEFAULTS,
    "granitemoe": granite_moe.DEFAULTS,
    "gpt_oss": gpt_oss.DEFAULTS,
}
# What transformers makes of these is not what the field says: see the family's functions.
MADE = {
    ("qwen3_moe", "sliding_window"),
    ("qwen2_moe", "sliding_window"),
    ("olmoe", "num_key_value_heads"),
    ("deepseek_v2", "num_key_value_heads"),
    ("granitemoe", "num_key_value_heads"),
}
# The names of a count of experts, and the other name that most families with it have.
COUNTS = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_local_experts",
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    ours, theirs = DEFAULTS[model_type], AutoConfig.for_model(model_type)
    rope = theirs.rope_parameters
    for name in ours.keys() - rope.keys() - {"rope_parameters"}:
        if (model_type, name) not in MADE:
            assert getattr(theirs, name) == ours[name], name
    assert {name: ours[name] for name in ours.keys() & rope.keys()}.items() <= rope.items()
    if "rope_parameters" in ours:
        assert ours["rope_parameters"].items() <= rope.items()


def test_every_family_is_here() -> None:
    assert DEFAULTS.keys() == {family.model_type for family in FAMILIES}


def test_a_null_of_gpt_oss_is_its_yarn_as_in_transformers() -> None:
    theirs = AutoConfig.for_model("gpt_oss", rope_parameters=None).rope_parameters
    assert theirs == AutoConfig.for_model("gpt_oss").rope_parameters and theirs["rope_type"] == "yarn"
    assert gpt_oss.parse_config({"rope_parameters": None}) == gpt_oss.parse_config({})
    assert gpt_oss.parse_config({"rope_parameters": {"rope_type": "default"}}) != gpt_oss.parse_config({})


@pytest.mark.parametrize("family", FAMILIES[1:], ids=lambda family: family.model_type)
def test_a_null_beside_a_fields_other_name_says_nothing(family: Family) -> None:
    (name,) = COUNTS.keys() & DEFAULTS[family.model_type].keys()
    other = "num_experts" if family.model_type == "deepseek_v2" else COUNTS[name]
    plain = SMALL | dict(CASES[family.model_type].base)
    count = plain.pop(name)
    expected = family.parse_config(plain | {name: count})
    for given in ({name: count, other: None}, {name: None, other: count}, {other: count}):
        assert family.parse_config(plain | given) == expected


def test_a_count_by_its_other_name_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_local_experts is nan; it must be an integer"):
        gpt_oss.parse_config({"num_experts": float("nan")})
    with pytest.raises(ConfigError, match="num_experts is nan; but num_local_experts, its other name, is 8"):
        gpt_oss.parse_config({"num_experts": float("nan"), "num_local_experts": 8})
