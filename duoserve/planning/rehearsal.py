"""Rehearsals: a few made-up layers of a model's sizes are run on this machine, and the time of each layer is taken.

What formulas of rates cannot know comes out of it: the host's time for a layer, an expert and a miss, what copies take
from the computation, and how fast products of just these sizes are.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np

from duoserve.experts.layout import ExpertLayout
from duoserve.models.described import DescribedModel
from duoserve.planning.made_up import PassNotes, Running, few_layers, running, staged
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import POLICIES, Policy

TIERS = ("disk", "ram")
RESIDENT = "resident"
WAYS = ((RESIDENT, "disk"), *product(("duoserve", "lru", "on-demand", "layer-prefetch"), TIERS))  # policies, tiers
LAYERS = 4
SLOTS = 3 / 8  # of the experts, where not all are in slots
STEPS, PROMPTS = 24, 3
MAX_PROMPT = 512
MAX_BYTES = 1 << 30
TRIMMED = 0.1  # of the samples, at either end: others' work on this machine


class LayerTimes(NamedTuple):
    """Seconds of a layer by how many of its experts are missing (or one figure for all), and of all beside the layers.

    ``copies`` are those of a layer, on average.
    """

    layer_s: tuple[float, ...]
    rest_s: float
    copies: float


class Times(NamedTuple):
    """Of one policy, with the experts in one tier."""

    decode: LayerTimes
    prefill: LayerTimes


@dataclass(frozen=True)
class Rehearsal:
    """What was measured for experts of ``slot_bytes``, prompts of ``prompt`` tokens and steps behind them.

    ``times`` are by policy and by tier; "resident" knows no tier and is under the first.
    """

    slot_bytes: int
    prompt: int
    times: Mapping[str, Mapping[str, Times]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """What ``to_dict`` gave; TypeError, ValueError or KeyError for anything else."""
        times = {
            policy: {tier: Times(*(_layer_times(part) for part in parts)) for tier, parts in tiers.items()}
            for policy, tiers in raw["times"].items()
        }
        return cls(int(raw["slot_bytes"]), int(raw["prompt"]), times)


def _layer_times(raw: Sequence[Any]) -> LayerTimes:
    layer_s, rest_s, copies = raw
    return LayerTimes(tuple(float(seconds) for seconds in layer_s), float(rest_s), float(copies))


def can_rehearse(model: DescribedModel, layout: ExpertLayout) -> bool:
    """Whether the made-up layers are small enough to be made up: experts in RAM and on the disk, and dense weights."""
    config = few_layers(model.config, LAYERS)
    dense = model.family.dense_bytes(config, config.dtype)
    return dense + len(config.moe_layers) * config.num_experts * layout.slot_bytes <= MAX_BYTES


def rehearse(
    model: DescribedModel, layout: ExpertLayout, prompt: int, folder: Path, ways: Sequence[tuple[str, str]] = WAYS
) -> Rehearsal:
    """Runs each of ``ways``; ``folder`` is where packs lie, so its disk is the one that counts."""
    config, prompt = few_layers(model.config, LAYERS), min(prompt, MAX_PROMPT)
    total = len(config.moe_layers) * config.num_experts
    folder.mkdir(parents=True, exist_ok=True)
    times: dict[str, dict[str, Times]] = {}
    with TemporaryDirectory(dir=folder) as scratch, staged(model.family, config, layout, Path(scratch)) as stage:
        for name, tier in ways:
            policy = POLICIES[name]
            slots = total if policy.all_resident else max(config.num_experts, int(SLOTS * total))
            with running(stage, policy, slots, tier, prompt + STEPS + 1) as run:
                times.setdefault(name, {})[tier] = _times(run, policy, prompt)
    return Rehearsal(layout.slot_bytes, prompt, times)


class _Pass(NamedTuple):
    """A pass: its seconds, the watch's notes, and how many copies had ended when it had."""

    seconds: float
    notes: PassNotes
    copies: float


def _times(run: Running, policy: Policy, prompt: int) -> Times:
    """Behind a request that fills the slots and warms everything up."""
    list(_passes(run, prompt, 2))
    prefills, steps = [], []
    for number in range(PROMPTS):
        first, *others = _passes(run, prompt, STEPS if number == 0 else 1)
        prefills.append(first)
        steps += others
    return Times(_of_steps(steps, policy.keeps), _of_prompts(prefills))


def _passes(run: Running, prompt: int, steps: int) -> Iterator[_Pass]:
    """One request, pass by pass."""
    run.watch.passes.clear()
    params = SamplingParams(max_tokens=1 + steps, temperature=0.0, ignore_eos=True)
    copied = [run.meter.snapshot().bytes.total for _ in run.engine.generate([Request([1] * prompt, params)])]
    stats = run.meter.snapshot()
    for seconds, notes, nbytes in zip([stats.ttft_s or 0.0, *stats.itl_s], run.watch.passes, copied, strict=True):
        yield _Pass(seconds - notes.away_s, notes, nbytes / run.slot_bytes)


def _of_prompts(prefills: Sequence[_Pass]) -> LayerTimes:
    layer_s = trimmed_mean([gap for run in prefills for gap in _gaps_s(run)])
    num_layers = len(prefills[0].notes.asked_s)
    total_s = trimmed_mean([run.seconds for run in prefills])
    copies = statistics.mean(run.copies for run in prefills) / num_layers
    return LayerTimes((layer_s,), total_s - num_layers * layer_s, copies)


def _of_steps(steps: Sequence[_Pass], keeps: bool) -> LayerTimes:
    """By the number of missing experts where a policy ``keeps`` some; numbers that never came are interpolated."""
    by_missing: dict[int, list[float]] = {}
    for run in steps:
        for missing, gap in zip(run.notes.missing, _gaps_s(run), strict=False):
            by_missing.setdefault(missing if keeps else 0, []).append(gap)
    seen = sorted(by_missing)
    means = [trimmed_mean(by_missing[missing]) for missing in seen]
    layer_s = tuple(float(s) for s in np.interp(range(seen[-1] + 1), seen, means))
    within_s = [sum(layer_s[missing if keeps else 0] for missing in run.notes.missing) for run in steps]
    rest_s = trimmed_mean([run.seconds - within for run, within in zip(steps, within_s, strict=True)])
    copies = statistics.mean(missing for run in steps for missing in run.notes.missing)
    return LayerTimes(layer_s, rest_s, copies)


def _gaps_s(run: _Pass) -> list[float]:
    """From when a layer asks for its experts to when the next one does."""
    return [later - asked for asked, later in pairwise(run.notes.asked_s)]


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without the share TRIMMED of the values at either end."""
    cut = int(TRIMMED * len(values))
    return statistics.mean(sorted(values)[cut : len(values) - cut])
