"""Times of passes by a rehearsal: the time that a layer took, times the number of layers.

Pure functions. For longer prompts and batches, which are not rehearsed, the measured time is scaled by the ratio that
the formulas of speed.py give. Times are seconds, and counts are means over the MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Self

import numpy as np

from duoserve.planning.rehearsal import RESIDENT, TIERS, PolicyTimes, PromptTimes, Rehearsal, StepTimes
from duoserve.planning.speed import Costs, PromptSpec, Seconds, StepSpec, chances
from duoserve.scheduling.policies import Policy


@dataclass(frozen=True)
class RehearsedCosts(Costs):
    """Costs of a model whose layers were rehearsed; for policies that were not, those of the formulas."""

    rehearsal: Rehearsal

    @classmethod
    def of(cls, costs: Costs, rehearsal: Rehearsal) -> Self:
        """Costs of the same model and machine, with times by ``rehearsal``."""
        return cls(costs.machine, costs.model, costs.ram_share, rehearsal, copy_threads=costs.copy_threads)

    def decode(self, policy: Policy, step: StepSpec) -> Seconds:
        wanted = super().decode(policy, step)
        if policy.name not in self.rehearsal.times:
            return wanted
        base = replace(step, sequences=1, context=self.rehearsal.prompt, asked=float(self.model.shape.top_k))
        measured_s = self._over_tiers(policy, lambda times: self._step_s(times.decode, base.hit_rate))
        return Seconds(measured_s * wanted.total / super().decode(policy, base).total, wanted.busy)

    def prefill(self, policy: Policy, prompt: PromptSpec) -> Seconds:
        wanted = super().prefill(policy, prompt)
        if policy.name not in self.rehearsal.times:
            return wanted
        base = replace(prompt, tokens=self.rehearsal.prompt, sequences=1)
        copies = self._prefill_copies(policy, base)
        measured_s = self._over_tiers(policy, lambda times: self._prompt_s(times.prefill, copies))
        return Seconds(measured_s * wanted.total / super().prefill(policy, base).total, wanted.busy)

    def _over_tiers(self, policy: Policy, seconds: Callable[[PolicyTimes], float]) -> float:
        tiers = self.rehearsal.times[policy.name]
        if len(tiers) == 1:
            return seconds(next(iter(tiers.values())))
        disk, ram = (seconds(tiers[tier]) for tier in TIERS)
        return self.ram_share * ram + (1 - self.ram_share) * disk

    def _step_s(self, times: StepTimes, hit_rate: float) -> float:
        """The mean over how many experts a layer misses, if each is missing with the chance ``1 - hit_rate``."""
        top_k, num_layers = self.model.shape.top_k, len(self.model.shape.layers)
        seen = range(len(times.layer_s))
        layer_s = sum(chance * along(seen, times.layer_s, missing) for missing, chance in chances(top_k, 1 - hit_rate))
        return num_layers * layer_s + times.rest_s

    def _prompt_s(self, times: PromptTimes, copies: float) -> float:
        """Seconds interpolated at ``copies`` copies a layer. A layer without copies takes as long as a resident one."""
        seen, layer_s, resident = times.copies, times.layer_s, self.rehearsal.times.get(RESIDENT)
        if len(seen) > 1 and resident is not None:
            seen, layer_s = (0.0, *seen), (next(iter(resident.values())).prefill.layer_s[0], *layer_s)
        return len(self.model.shape.layers) * along(seen, layer_s, copies) + times.rest_s


def along(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """The value at ``place`` of straight lines through ``values`` at ``places``.

    ``places`` may come in any order; if a place comes twice, the mean of its values counts. Beyond the last place the
    last line goes on, but never falls; before the first place the first value holds.
    """
    by_place: dict[float, list[float]] = {}
    for at, value in sorted(zip(places, values, strict=True)):
        by_place.setdefault(at, []).append(value)
    seen, means = list(by_place), [mean(found) for found in by_place.values()]
    if len(seen) > 1 and place > seen[-1]:
        slope = (means[-1] - means[-2]) / (seen[-1] - seen[-2])
        return means[-1] + max(0.0, slope) * (place - seen[-1])
    return float(np.interp(place, seen, means))
