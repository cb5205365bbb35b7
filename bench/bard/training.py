"""How the embedded models learn: Muon and AdamW, a balance of experts in every layer, and checkpoints on the way.

Shapes: B batch, T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from bard.configs import CONTEXT
from bard.muon import Muon

CHECKPOINT_SECONDS = 300


@dataclass(frozen=True)
class Recipe:
    """``epochs``: passes over the stream in expectation; ``batch``: windows of CONTEXT tokens in a step.

    ``balance`` is the weight of the load-balancing loss.
    """

    epochs: float
    balance: float
    batch: int
    weight_decay: float
    check_every: int

    def steps(self, stream: Tensor) -> int:
        return int(self.epochs * len(stream) / (self.batch * CONTEXT))


def rate(step: int, steps: int) -> float:
    """The share of the learning rate: 50 steps of warm-up, and a linear decay over the last 60 %."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.6 * steps))


def make_optimizers(model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = p.ndim >= 2 and "embed" not in name and not name.endswith("mlp.gate.weight")
        (matrices if is_matrix else rest).append(p)
    return [
        Muon(matrices, lr=0.02, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def load_balance(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Per-layer form of the Switch loss (1 when balanced); a mean over layers would let one layer collapse."""
    losses = []
    for logits_TE in router_logits:
        probs_TE = logits_TE.softmax(-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, logits_TE.topk(top_k).indices, 1.0)
        losses.append(logits_TE.shape[-1] * (probs_TE.mean(0) * chosen_TE.mean(0)).sum() / top_k)
    return torch.stack(losses).mean()


class Training:
    """A model on its way: batches of CONTEXT+1 windows at random offsets of the token stream.

    Its state is kept in ``work``; one that finds a checkpoint there goes on from it.
    """

    def __init__(self, model: PreTrainedModel, stream: Tensor, recipe: Recipe, work: Path) -> None:
        self.model, self.stream, self.recipe = model, stream, recipe
        self.optimizers = make_optimizers(model, recipe.weight_decay)
        self.base_rates = [opt.param_groups[0]["lr"] for opt in self.optimizers]
        self.order = torch.Generator().manual_seed(1)
        self.done, self.smooth, self.seconds = 0, math.log(model.config.vocab_size), 0.0
        self._file = work / "checkpoint.pt"
        work.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            self._restore()

    def run(self, check: Callable[[], str]) -> None:
        """All steps that are left; ``check`` is asked for a line now and then."""
        steps, saved = self.recipe.steps(self.stream), perf_counter()
        bar = tqdm(range(self.done, steps), desc="train", initial=self.done, total=steps, mininterval=10)
        for step in bar:
            start = perf_counter()
            self._step(rate(step, steps))
            self.seconds += perf_counter() - start
            bar.set_postfix(loss=f"{self.smooth:.3f}", refresh=False)
            if self.done % self.recipe.check_every == 0:
                print(f"\nstep {self.done}/{steps} train {self.smooth:.3f}", check(), flush=True)
            if perf_counter() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = perf_counter()
        self._save()

    def _step(self, share: float) -> None:
        self.model.train()
        loss, balance = self._losses(self._batch())
        (loss + self.recipe.balance * balance).backward()
        for opt, base in zip(self.optimizers, self.base_rates, strict=True):
            opt.param_groups[0]["lr"] = base * share
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.smooth += 0.05 * (loss.item() - self.smooth)
        self.done += 1

    def _batch(self) -> Tensor:
        starts = torch.randint(len(self.stream) - CONTEXT - 1, (self.recipe.batch,), generator=self.order)
        return self.stream[starts[:, None] + torch.arange(CONTEXT + 1)]

    def _losses(self, window_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of a token, and how unevenly the experts are used."""
        out = self.model(window_BT[:, :-1], use_cache=False)
        loss = F.cross_entropy(out.logits.flatten(0, 1), window_BT[:, 1:].flatten())
        return loss, load_balance(out.router_logits, self.model.config.num_experts_per_tok)

    def _save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [opt.state_dict() for opt in self.optimizers],
            "order": self.order.get_state(),
            "progress": (self.done, self.smooth, self.seconds),
        }
        unfinished = self._file.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self._file)

    def _restore(self) -> None:
        state = torch.load(self._file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for opt, saved in zip(self.optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        self.order.set_state(state["order"])
        self.done, self.smooth, self.seconds = state["progress"]
        print(f"going on from step {self.done}", flush=True)
