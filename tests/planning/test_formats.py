"""Experts in other formats than the checkpoint's."""

from __future__ import annotations

import pytest
import torch

from duoserve.errors import ConfigError
from duoserve.models.stored import expert_layout
from duoserve.planning.formats import layout_in
from duoserve.planning.model_cards import find_model
from tests.helpers.checkpoints import save_mixtral

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("form", "megabytes"), [("bf16", 352.3), ("bf12", 266.5), ("fp8", 176.2), ("int8", 176.2), ("int4", 92.2)]
)
def test_mixtral_in_every_format(form: str, megabytes: float) -> None:
    layout = layout_in(find_model("mixtral-8x7b").config, form, BF16)
    assert layout.slot_bytes / 1e6 == pytest.approx(megabytes, rel=2e-3)


def test_no_format_is_the_checkpoints_own() -> None:
    for name in ("gpt-oss-20b", "deepseek-v3", "mixtral-8x7b"):
        config = find_model(name).config
        assert layout_in(config, None, BF16) == expert_layout(config, BF16)


def test_what_is_quantized_can_be_planned_in_another_format() -> None:
    config = find_model("gpt-oss-20b").config
    assert layout_in(config, "bf16", BF16).slot_bytes / 1e6 == pytest.approx(49.8, rel=2e-3)
    assert layout_in(config, "int4", BF16).name == "int4-64-float16"


def test_sizes_that_a_format_cannot_have_are_refused(tmp_path) -> None:
    config = find_model(save_mixtral(tmp_path)).config
    with pytest.raises(ConfigError, match="no groups of 32, 64 or 128 divide an expert of 32 x 24"):
        layout_in(config, "int4", BF16)
