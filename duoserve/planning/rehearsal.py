"""Rehearsals: a few layers of a model's sizes, with made-up weights, are run on this machine, and each layer is timed.

They measure what formulas cannot know: the host's time for a layer, an expert and a miss, how much copies slow down the
computation, and how fast matrix products of these sizes are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from duoserve.experts.device import CPU, free_bytes
from duoserve.experts.layout import ExpertLayout
from duoserve.models.described import DescribedModel
from duoserve.planning.made_up import PassNotes, Running, Stage, few_layers, running, staged
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import POLICIES, Policy

TIERS = ("disk", "ram")
RESIDENT = "resident"
WAYS = ((RESIDENT, "disk"), *product(("duoserve", "lru", "on-demand", "layer-prefetch"), TIERS))  # policies, tiers
LAYERS = 4
FEW, MANY = 3 / 8, 3 / 4  # shares of the experts in slots; policies that keep no experts need only few
STEPS = 12  # decode steps behind each prompt
PROMPTS, MOST_PROMPTS, ENOUGH_S = 3, 8, 0.6  # prompts for each share of slots: more of them if they take little time
MIN_PROMPT, MAX_PROMPT = 2, 512  # a prompt of a single token would look like a decode step
MAX_BYTES = 1 << 30
TRIMMED = 0.1  # the share of samples dropped at either end, which other programs may have disturbed


class StepTimes(NamedTuple):
    """Seconds of a decode step: ``layer_s[n]`` for a layer that misses n experts, ``rest_s`` outside of the layers.

    Under a policy that keeps no experts, ``layer_s`` has a single entry for all layers.
    """

    layer_s: tuple[float, ...]
    rest_s: float


class PromptTimes(NamedTuple):
    """Seconds of a prompt: ``layer_s[i]`` for a layer with ``copies[i]`` copies, ``rest_s`` outside of the layers.

    There is an entry for each rehearsed share of the experts in slots.
    """

    copies: tuple[float, ...]
    layer_s: tuple[float, ...]
    rest_s: float


class PolicyTimes(NamedTuple):
    """The times of one policy, with the experts in one tier."""

    decode: StepTimes
    prefill: PromptTimes


@dataclass(frozen=True)
class Rehearsal:
    """Times measured with experts of ``slot_bytes`` bytes, prompts of ``prompt`` tokens, and steps behind them.

    ``times`` are by policy and then by tier. "resident" is the same in every tier, and is stored under the first.
    """

    slot_bytes: int
    prompt: int
    times: Mapping[str, Mapping[str, PolicyTimes]]

    def to_dict(self) -> dict[str, Any]:
        """The rehearsal as an object for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The rehearsal from the object of ``to_dict``.

        Raises AttributeError, KeyError, TypeError or ValueError for anything else.
        """
        times = {
            policy: {tier: _times(*parts) for tier, parts in tiers.items()} for policy, tiers in raw["times"].items()
        }
        return cls(int(raw["slot_bytes"]), int(raw["prompt"]), times)


def _times(decode: Sequence[Any], prefill: Sequence[Any]) -> PolicyTimes:
    (step_s, step_rest_s), (copies, layer_s, rest_s) = decode, prefill
    return PolicyTimes(
        StepTimes(_floats(step_s), float(step_rest_s)), PromptTimes(_floats(copies), _floats(layer_s), float(rest_s))
    )


def _floats(raw: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in raw)


def layers_to_rehearse(model: DescribedModel, layout: ExpertLayout, free: int) -> int:
    """The number of layers to rehearse, which fit in half of ``free`` bytes of RAM, with their experts in MAX_BYTES.

    0 if even two layers do not fit. Larger experts need no rehearsal: the time of moving their bytes dominates, for
    which formulas will do.
    """
    for count in range(LAYERS, 1, -1):
        config = few_layers(model.config, count)
        experts = len(config.moe_layers) * config.num_experts * layout.slot_bytes
        needed = model.family.dense_bytes(config, config.dtype) + (1 + MANY) * experts
        if experts <= MAX_BYTES and 2 * needed <= free and len(config.moe_layers) == count:
            return count
    return 0


def rehearse(
    model: DescribedModel, layout: ExpertLayout, prompt: int, folder: Path, ways: Sequence[tuple[str, str]] = WAYS
) -> Rehearsal | None:
    """Measures each of ``ways`` (policy, tier); None if the model is too large, or its context too short.

    Experts are read from the disk that ``folder`` is on, so it should be where packs lie.
    """
    count = layers_to_rehearse(model, layout, free_bytes(CPU))
    longest = min(MAX_PROMPT, model.config.num_positions - STEPS - 1)
    if not count or longest < MIN_PROMPT:
        return None
    config, prompt = few_layers(model.config, count), min(max(prompt, MIN_PROMPT), longest)
    folder.mkdir(parents=True, exist_ok=True)
    times: dict[str, dict[str, PolicyTimes]] = {}
    with TemporaryDirectory(dir=folder) as scratch, staged(model.family, config, layout, Path(scratch)) as stage:
        for name, tier in tqdm(ways, desc="rehearsal", unit="way", disable=not sys.stderr.isatty()):
            times.setdefault(name, {})[tier] = _rehearsed(stage, POLICIES[name], tier, prompt)
    return Rehearsal(layout.slot_bytes, prompt, times)


def _rehearsed(stage: Stage, policy: Policy, tier: str, prompt: int) -> PolicyTimes:
    total = len(stage.config.moe_layers) * stage.config.num_experts
    shares = (1.0,) if policy.all_resident else (MANY, FEW) if policy.keeps else (FEW,)
    by_share = []
    for slots in [max(stage.config.num_experts, int(share * total)) for share in shares]:
        with running(stage, policy, slots, tier, prompt + STEPS + 1) as run:
            by_share.append(timed_requests(run, prompt))
    steps = [others for requests in by_share for _, *others in requests]
    return PolicyTimes(
        step_times(steps, policy.keeps), prompt_times([[first for first, *_ in one] for one in by_share])
    )


class TimedPass(NamedTuple):
    """One pass: its seconds, the notes of its layers' times, and how many copies have ended since its request began."""

    seconds: float
    notes: PassNotes
    copies: float


def timed_requests(run: Running, prompt: int) -> list[list[TimedPass]]:
    """The timed passes of several requests, after one that fills the slots and warms everything up."""
    list(timed_passes(run, prompt, STEPS))
    requests, begun = [list(timed_passes(run, prompt, STEPS))], time.perf_counter()
    while len(requests) < PROMPTS or (len(requests) < MOST_PROMPTS and time.perf_counter() - begun < ENOUGH_S):
        requests.append(list(timed_passes(run, prompt, STEPS)))
    return requests


def timed_passes(run: Running, prompt: int, steps: int) -> Iterator[TimedPass]:
    """The timed passes of one request."""
    run.watch.passes.clear()
    params = SamplingParams(max_tokens=1 + steps, temperature=0.0, ignore_eos=True)
    copied = [run.meter.snapshot().bytes.total for _ in run.engine.generate([Request([1] * prompt, params)])]
    stats = run.meter.snapshot()
    for seconds, notes, nbytes in zip([stats.ttft_s or 0.0, *stats.itl_s], run.watch.passes, copied, strict=True):
        yield TimedPass(seconds - notes.away_s, notes, nbytes / run.slot_bytes)


def prompt_times(runs: Sequence[Sequence[TimedPass]]) -> PromptTimes:
    """The medians of a prompt's times in each run, from its prompts' passes; runs have fewer and fewer slots."""
    copies, layers_s, rests_s = [], [], []
    for prompts in runs:
        num_layers = len(prompts[0].notes.asked_s)
        means_s = [statistics.mean(_gaps_s(one)) for one in prompts]
        layers_s.append(statistics.median(means_s))
        rests_s.append(statistics.median(p.seconds - num_layers * s for p, s in zip(prompts, means_s, strict=True)))
        copies.append(statistics.mean(one.copies for one in prompts) / num_layers)
    return PromptTimes(tuple(copies), tuple(layers_s), statistics.mean(rests_s))


def step_times(requests: Sequence[Sequence[TimedPass]], keeps: bool) -> StepTimes:
    """Step times from each request's decode steps: by how many experts a layer misses if ``keeps``, else for all.

    Times of numbers that never occurred are interpolated. The differences between numbers come from trimmed means over
    all steps. How long steps take as a whole comes from the median of the requests' means, as TPOT does: so what is
    slow now and then counts, and what was slow in one request does not.
    """
    by_missing: dict[int, list[float]] = {}
    for step in chain.from_iterable(requests):
        for missing, gap in zip(step.notes.missing, _gaps_s(step), strict=False):
            by_missing.setdefault(missing if keeps else 0, []).append(gap)
    seen = sorted(by_missing)
    shape = np.interp(range(seen[-1] + 1), seen, [trimmed_mean(by_missing[missing]) for missing in seen])

    def by_shape(missing: Sequence[int]) -> float:
        return sum(float(shape[number if keeps else 0]) for number in missing)

    level = statistics.median(
        sum(sum(_gaps_s(step)) for step in steps) / sum(by_shape(step.notes.missing[:-1]) for step in steps)
        for steps in requests
    )
    rest_s = statistics.median(
        statistics.mean(step.seconds - level * by_shape(step.notes.missing) for step in steps) for steps in requests
    )
    return StepTimes(_floats((level * shape).tolist()), rest_s)


def _gaps_s(run: TimedPass) -> list[float]:
    """The seconds from each layer's request for its experts to the next layer's."""
    return [later - asked for asked, later in pairwise(run.notes.asked_s)]


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without the smallest and the largest values, a share of TRIMMED at either end."""
    cut = int(TRIMMED * len(values))
    return statistics.mean(sorted(values)[cut : len(values) - cut])
