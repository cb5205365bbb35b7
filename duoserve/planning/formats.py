"""The formats in which a plan may have a model's experts: the checkpoint's, or one that they can be quantized to."""

from __future__ import annotations

from dataclasses import replace

import torch

from duoserve.architecture import Quantization
from duoserve.config import ModelConfig
from duoserve.experts.layout import ExpertLayout
from duoserve.models.stored import expert_layout, quantized_by_us

FORMATS = ("bf16", "bf12", "fp8", "int8", "int4")


def layout_in(config: ModelConfig, form: str | None, dtype: torch.dtype) -> ExpertLayout:
    """The row of one expert in one of FORMATS, or in the checkpoint's if None; raises ConfigError if impossible."""
    if form is None:
        return expert_layout(config, dtype)
    plain = replace(config, quantization=None)
    if form == "bf16":
        return expert_layout(plain, torch.bfloat16)
    if form == "fp8":
        return expert_layout(replace(config, quantization=Quantization("fp8")), dtype)
    return ExpertLayout(quantized_by_us(plain, form), config.hidden_size, config.expert_intermediate_size)
