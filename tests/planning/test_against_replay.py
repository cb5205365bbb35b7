"""The formulas against the real scheduler on a virtual clock: 3 models x 3 capacities x 2 links, seeds fixed."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest

from duoserve.experts.budget import MemoryPlan
from duoserve.planning.model_cards import find_model
from duoserve.planning.policy_speed import Question, Speed, speed_of
from duoserve.planning.routing_curves import curves_for
from duoserve.planning.sizes import ModelSizes, layer_sizes
from duoserve.planning.speed import Costs
from duoserve.replaying.hardware import Machine, find_hardware
from duoserve.replaying.replay import Replay, replay
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import get_policy
from duoserve.traces.synthetic import CARDS, synthesize
from duoserve.traces.trace import Trace

LAYERS, REQUESTS, PROMPT, TOKENS = 3, 3, 64, 192
WITHIN = 0.15
FORMATS = {"mixtral-8x7b": "int4", "gpt-oss-20b": None, "qwen3-30b-a3b": "fp8"}


@cache
def trace_of(model: str) -> Trace:
    card = dataclasses.replace(CARDS[model], num_layers=LAYERS)
    return synthesize(card, REQUESTS, TOKENS, 0.8, seed=3, prompt=PROMPT)


def both(model: str, share: float, link: str, policy: str) -> tuple[Replay, Speed]:
    card, layer, trace = CARDS[model], layer_sizes(find_model(model), FORMATS[model]), trace_of(model)
    machine = Machine(find_hardware(link), layer)
    total = LAYERS * card.num_experts
    memory = MemoryPlan(int(share * total), total, total, machine.sizes.expert_bytes, 0, 0, 0)
    sizes = ModelSizes(layer, ModelShape(card.num_experts, card.top_k, trace.meta.layers), 0, 0, 0)
    curves = curves_for(card.num_experts, card.top_k, model)
    question = Question(prompt=PROMPT, new_tokens=TOKENS)
    planned = speed_of(Costs(machine, sizes, 1.0), curves, memory, question, policy)
    return replay(trace, get_policy(policy).without_guesses(), machine, memory.num_slots), planned


@pytest.mark.parametrize("link", ["pcie3", "pcie5"])
@pytest.mark.parametrize("share", [0.25, 0.375, 0.5])
@pytest.mark.parametrize("model", FORMATS)
def test_times_are_the_replays(model: str, share: float, link: str) -> None:
    """The first request fills the slots, and is not counted."""
    ran, planned = both(model, share, link, "duoserve" if link == "pcie5" else "lru")
    assert planned.tpot.total == pytest.approx(np.mean(ran.itl_s[TOKENS:]), rel=WITHIN)
    assert planned.ttft.total == pytest.approx(np.mean(ran.ttft_s[1:]), rel=WITHIN)


@pytest.mark.parametrize("policy", ["on-demand", "layer-prefetch"])
def test_so_are_those_of_the_policies_that_keep_nothing(policy: str) -> None:
    ran, planned = both("gpt-oss-20b", 0.5, "pcie5", policy)
    assert planned.tpot.total == pytest.approx(ran.tpot_s, rel=WITHIN)
    assert planned.ttft.total == pytest.approx(ran.ttft_mean_s, rel=WITHIN)
