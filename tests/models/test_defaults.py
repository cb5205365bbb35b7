"""A field that config.json does not have means what it means to transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from duoserve.models import deepseek, glm4_moe, gpt_oss, granite_moe, mixtral, olmoe, qwen2_moe, qwen3_moe
from duoserve.models.registry import FAMILIES

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
