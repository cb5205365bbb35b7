"""What tests ask of small models."""

from __future__ import annotations

from typing import Any

from duoserve import SamplingParams


def toy_prompt(length: int) -> list[int]:
    """Token ids of 1 to 95, which every small checkpoint has, in no order and always the same."""
    return [(11 * i * i + 5 * i) % 95 + 1 for i in range(length)]


def greedy(max_tokens: int = 8, **more: Any) -> SamplingParams:
    """The likeliest tokens, exactly so many of them."""
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | more)
