"""Times of prompts and decode steps, by formulas for what a replay would find.

Pure functions of rates and counts. Copies and computation of a layer overlap as far as the policy allows. The bound is
the part of the machine that is busy longest. Times are seconds, and counts are means over the MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, exp, lgamma, log, log1p
from typing import NamedTuple

from duoserve.config import EngineConfig
from duoserve.planning.sizes import ModelSizes
from duoserve.replaying.hardware import Machine
from duoserve.scheduling.plan import DecodeFetch, PrefillFetch
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.prefill import SPECULATION_SHARE, active_share


@dataclass(frozen=True)
class PromptSpec:
    """``sequences`` prompts with ``tokens`` tokens in all, which use ``used`` experts of a layer.

    ``resident`` is the share of the experts (0 to 1) that are in slots before the prompts and stay there.
    """

    tokens: int
    sequences: int
    used: float
    resident: float


@dataclass(frozen=True)
class StepSpec:
    """A decode step of ``sequences`` sequences, each behind ``context`` tokens; a layer uses ``asked`` experts.

    ``hit_rate`` is the share (0 to 1) of these that are in slots, under policies that keep experts.
    """

    sequences: int
    context: int
    asked: float
    hit_rate: float


@dataclass(frozen=True)
class Seconds:
    """Seconds of a pass: in ``total``, and those in which each part of the machine is ``busy``."""

    total: float
    busy: Mapping[str, float]

    @property
    def bound(self) -> str:
        """The part that is busy longest: link, disk, memory, compute or overhead."""
        return max(self.busy, key=self.busy.__getitem__)


class _Work(NamedTuple):
    """The work of a pass: new tokens, their sequences, the context of each sequence, and the experts of a layer."""

    tokens: int
    sequences: int
    context: int
    experts: float


@dataclass(frozen=True)
class Costs:
    """The costs of a model's passes on a machine. ``ram_share`` (0 to 1) of its experts wait in RAM, the rest on disk.

    On a CPU ``copy_threads`` experts are read at a time.
    """

    machine: Machine
    model: ModelSizes
    ram_share: float
    copy_threads: int = field(default=EngineConfig().copy_threads, kw_only=True)

    def decode(self, policy: Policy, step: StepSpec) -> Seconds:
        """The seconds of a decode step without prefetches."""
        asked, num_layers = step.asked, len(self.model.shape.layers)
        before = self._attention_s(step.sequences, step.sequences, step.context)
        one = self._expert_s(step.sequences, asked)
        match policy.decode:
            case DecodeFetch.RESIDENT:
                copies, layer = 0.0, before + asked * one
            case DecodeFetch.ON_DEMAND:
                copies, layer = asked, before + self._arrival_s(asked) + asked * one
            case DecodeFetch.NEXT_LAYER:
                # Copying a whole layer takes so long that few of a step's guesses arrive in time. Demands go before
                # them; but on a CPU each copy thread ends the read that it has begun, half of which is left on average.
                wasted = self.copy_threads if self.machine.hardware.host_computes else 0
                copies = asked + wasted
                layer = before + (asked + wasted / 2) * self.copy_s + asked * one
            case DecodeFetch.CACHE:
                copies = asked * (1 - step.hit_rate)
                layer = before + self._mixed_s(asked, step.hit_rate, one)
        work = _Work(step.sequences, step.sequences, step.context, asked)
        return Seconds(num_layers * layer + self._rest_s(work), self._busy(work, copies))

    def prefill(self, policy: Policy, prompt: PromptSpec) -> Seconds:
        """The seconds of one pass over all prompts, up to their first tokens."""
        num_layers, used = len(self.model.shape.layers), prompt.used
        before, one = self._attention_s(prompt.tokens, prompt.sequences, 0), self._expert_s(prompt.tokens, used)
        copies = self._prefill_copies(policy, prompt)
        compute, link = num_layers * (before + used * one), num_layers * copies * self.copy_s
        if policy.prefill is PrefillFetch.ON_DEMAND or not copies:
            total = compute + link
        elif self._speculates(policy, prompt):
            total = max(link + one, compute + max(0.0, self.copy_s - before))
        else:
            total = num_layers * (before + max(used * one, copies * self.copy_s + one))
        work = _Work(prompt.tokens, prompt.sequences, 0, used)
        return Seconds(total + self._rest_s(work), self._busy(work, copies))

    @cached_property
    def copy_s(self) -> float:
        """Seconds of an expert's copy while others are copied too; the mean over experts in RAM and on disk."""
        return self._copy_s(self.machine.hardware.disk)

    @cached_property
    def _lone_copy_s(self) -> float:
        """Seconds of an expert's copy while no other is copied."""
        return self._copy_s(min(self.machine.hardware.disk, self.machine.hardware.reader))

    def _copy_s(self, disk: float) -> float:
        hardware, nbytes = self.machine.hardware, self.model.layer.expert_bytes
        if not hardware.host_computes:
            disk = min(disk, hardware.link)
        waiting = self.ram_share / hardware.link + (1 - self.ram_share) / disk
        return hardware.copy_latency_s + nbytes * waiting

    def _arrival_s(self, copies: float) -> float:
        """Seconds of ``copies`` demand loads. ``copy_threads`` are read at a time, none of them faster than alone."""
        turns = ceil(copies / self.copy_threads)
        return max(copies * self.copy_s, turns * self._lone_copy_s if self.machine.hardware.host_computes else 0.0)

    def _mixed_s(self, asked: float, hit_rate: float, one: float) -> float:
        """Seconds of a layer's experts: those in slots are computed while missing ones are copied.

        It is the mean over how many are missing, if each of them is missing with the chance ``1 - hit_rate``.
        """
        count = max(1, round(asked))
        mean = sum(chance * self._with_missing_s(count, n, one) for n, chance in chances(count, 1 - hit_rate))
        return mean * asked / count

    def _with_missing_s(self, asked: int, missing: int, one: float) -> float:
        if not missing:
            return asked * one
        return max(asked * one, self._arrival_s(missing) + one, self._arrival_s(1) + missing * one)

    def _prefill_copies(self, policy: Policy, prompt: PromptSpec) -> float:
        """Copies of a layer on average. Wrong guesses do not count: while the link is the bound, few are ever made."""
        match policy.prefill:
            case PrefillFetch.RESIDENT:
                return 0.0
            case PrefillFetch.ON_DEMAND | PrefillFetch.NEXT_LAYER:
                return prompt.used
            case _:
                return prompt.used * (1 - prompt.resident)

    def _speculates(self, policy: Policy, prompt: PromptSpec) -> bool:
        """Whether experts are copied before their layer is routed, which keeps the link busy."""
        return (
            policy.prefill is PrefillFetch.NEXT_LAYER
            or active_share(self.model.shape, prompt.tokens) >= SPECULATION_SHARE
        )

    def _expert_s(self, tokens: int, experts: float) -> float:
        """Seconds of computing one of the ``experts`` over which a layer's ``tokens`` tokens are spread."""
        return self.machine.expert_s(tokens * self.model.shape.top_k / experts)

    def _attention_s(self, tokens: int, sequences: int, context: int) -> float:
        """Seconds of a layer up to its router's choice, including reading the keys and values of the context."""
        cached = sequences * context * self.model.kv_bytes / self.machine.hardware.memory
        return self.machine.attention_s(tokens, context, sequences) + cached

    def _rest_s(self, work: _Work) -> float:
        """Seconds of the layers without experts, and of the head."""
        hardware, nbytes = self.machine.hardware, self.model.layer.other_bits / 8
        parts = (self.model.dense_params, work.tokens), (self.model.head_params, work.sequences)
        return sum(hardware.product_s(params * nbytes, 2.0 * rows * params, rows) for params, rows in parts)

    @property
    def _rest_bytes(self) -> float:
        return (self.model.dense_params + self.model.head_params) * self.model.layer.other_bits / 8

    def _rest_flops(self, work: _Work) -> float:
        return 2.0 * (work.tokens * self.model.dense_params + work.sequences * self.model.head_params)

    def _busy(self, work: _Work, copies: float) -> dict[str, float]:
        """Seconds in which each part is busy in a pass. What a device reads from disk crosses the link as well."""
        hardware, layer, num_layers = self.machine.hardware, self.model.layer, len(self.model.shape.layers)
        crossing = self.ram_share if hardware.host_computes else 1.0
        moved = num_layers * copies * layer.expert_bytes
        cached = work.sequences * work.context * self.model.kv_bytes
        read = num_layers * (layer.other_bytes + work.experts * layer.expert_bytes + cached)
        flops = self.machine.attention_flops(work.tokens, work.context, work.sequences)
        flops += 2 * work.tokens * self.model.shape.top_k * layer.expert_params
        return {
            "link": crossing * moved / hardware.link,
            "disk": (1 - self.ram_share) * moved / hardware.disk,
            "memory": (read + self._rest_bytes) / hardware.memory,
            "compute": (num_layers * flops + self._rest_flops(work)) / hardware.flops,
            "overhead": num_layers * hardware.layer_overhead_s,
        }


def chances(count: int, chance: float) -> Iterator[tuple[int, float]]:
    """The binomial distribution: each number of hits in ``count`` trials, and its probability."""
    for hits in range(count + 1):
        if 0.0 < chance < 1.0:  # by logarithms: a thousand trials can end in more ways than a float holds
            ways = lgamma(count + 1) - lgamma(hits + 1) - lgamma(count - hits + 1)
            yield hits, exp(ways + hits * log(chance) + (count - hits) * log1p(-chance))
        else:
            yield hits, float(hits == count * chance)
