"""Recorded decode steps of every family, and of a model whose routing is scripted: the bits of the model itself.

T tokens, B sequences, K top-k, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from duoserve.experts.layout import ExpertId
from duoserve.kv_cache import NewTokens
from duoserve.launching.launch import StepParts
from duoserve.models.moe import RoutingScript
from duoserve.models.opened import opened
from duoserve.models.transformer import Transformer
from duoserve.models.variants import with_script
from duoserve.passes import StepRunner
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.lagging import LaggingDevice, Truth, write
from tests.helpers.listeners import Copying
from tests.models.cases import FAMILIES

PROMPTS, MAX_TOKENS = [[3, 1, 4, 1, 5], [9, 2]], (8, 5)
MODES = ("event", "graph")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_the_bits_of_the_model_itself(model_type: str, mode: str, tmp_path: Path) -> None:
    family = FAMILIES[model_type]
    folder = family.save(tmp_path, family.hard)
    with opened(folder) as found:
        experts = list(found.experts)
    device = LaggingDevice(seed=7, in_ram=experts)
    slots = max(2 * family.top_k, len(experts) // 2)
    with assembled(
        folder, "lru", slots, device.copies, make_pool=device.pool, make_step_runner=device.recorded(mode)
    ) as engine:
        tokens = write(engine, PROMPTS, MAX_TOKENS)
        assert engine.meter.snapshot().misses["decode"] > 0
    assert device.recorder.num_recordings >= 2  # a batch of two, and of the one that goes on
    truth = Truth(folder, len(experts), PROMPTS, MAX_TOKENS)
    assert tokens == truth.tokens and truth.differences(device.logits) == []


class Script(RoutingScript):
    """Three layers' choice of two of eight experts: of a prompt by its layer, of a decode step by its number too.

    A step's choice lies where those of all steps lie.
    """

    def __init__(self) -> None:
        self.step = 0  # of decode, from 1; 0 is the prompt
        self._ids = [torch.zeros(len(PROMPTS), 2, dtype=torch.int64) for _ in range(3)]
        self._weights = [torch.zeros(len(PROMPTS), 2) for _ in range(3)]

    def next_step(self) -> None:
        """The next decode step begins."""
        self.step += 1
        for layer in range(3):
            weights_BK, ids_BK = self.of(layer, len(PROMPTS))
            self._weights[layer].copy_(weights_BK), self._ids[layer].copy_(ids_BK)

    def of(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """What the pass that runs chooses."""
        generator = torch.Generator().manual_seed(100 * self.step + layer)
        scores_TE = torch.rand(num_tokens, 8, generator=generator)
        return scores_TE.topk(2)

    def chosen(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """As in RoutingScript."""
        if not self.step:
            return self.of(layer, num_tokens)
        return self._weights[layer][:num_tokens], self._ids[layer][:num_tokens]

    def plays_in(self, model: Transformer) -> Transformer:
        """The model whose routers it takes the place of."""
        return with_script(model, self)


def scripted_run(folder: Path, mode: str) -> tuple[list[list[int]], list[Tensor], Copying]:
    """Tokens, the logits of all decode steps, and what a listener heard; mode "" is the model itself."""
    device = LaggingDevice(seed=8, in_ram=[ExpertId(layer, expert) for layer in range(3) for expert in range(8)])
    script, listener = Script(), Copying(lookahead=1)

    def runner(parts: StepParts) -> StepRunner:
        if mode:
            decode = device.recorded(mode)(parts)
        else:
            decode = device.lagging(lambda new_tokens: parts.model(parts.cache.batch(new_tokens)))

        def step(new_tokens: NewTokens) -> Tensor:
            script.next_step()
            return decode(new_tokens)

        return step

    with assembled(
        folder,
        "lru",
        9,
        device.copies,
        listener,
        make_pool=device.pool,
        make_step_runner=runner,
        change=script.plays_in,
    ) as engine:
        tokens = write(engine, PROMPTS, MAX_TOKENS)
        assert engine.meter.snapshot().misses["decode"] > 0
    return tokens, device.logits, listener


@pytest.mark.parametrize("mode", MODES)
def test_a_script_chooses_in_recorded_steps_too(mode: str, tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path)
    tokens, logits, heard = scripted_run(folder, mode)
    true_tokens, true_logits, _ = scripted_run(folder, "")
    assert tokens == true_tokens
    assert all(torch.equal(one, other) for one, other in zip(logits, true_logits, strict=True))
    script = Script()
    for script.step, routings in enumerate(heard.routings):
        for routing in routings:
            _, ids_BK = script.of(routing.layer, len(PROMPTS) if script.step else len(routing.topk_ids_TK))
            assert np.array_equal(routing.topk_ids_TK, ids_BK[: len(routing.topk_ids_TK)].numpy())
    assert len(heard.routings) == max(MAX_TOKENS)
