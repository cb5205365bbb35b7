"""The question that a planner answers, and the speed of a policy, from its slots, hits and copies."""

from __future__ import annotations

from dataclasses import dataclass

from duoserve.experts.budget import MemoryPlan
from duoserve.planning.routing_curves import RoutingCurves
from duoserve.planning.speed import Costs, PromptSpec, Seconds, StepSpec
from duoserve.scheduling.policies import POLICIES
from duoserve.scheduling.prefill import ring_size

# Policies without predictors (what a trained one gains is not known before the model has run), with the ranking of
# their caches. Of equally fast policies the first counts as best.
RANKED = {"resident": "lru", "duoserve": "lfru", "lru": "lru", "on-demand": "lru", "layer-prefetch": "lru"}


@dataclass(frozen=True)
class Question:
    """What a plan is made for: ``batch`` prompts of ``prompt`` tokens at a time, with ``new_tokens`` behind each.

    ``form`` is the experts' format (formats.py), None: the checkpoint's. ``memory`` caps everything on the device, in
    bytes, or ``expert_slots`` the slots (a count, or a share as "25%"), and ``host_memory`` the experts that wait in
    RAM; ``max_context`` is the tokens of the KV cache. ``routing`` names the card that hit rates are taken from, or
    UNIFORM; None: the model's own card or the nearest.
    """

    prompt: int = 512
    batch: int = 1
    new_tokens: int = 256
    form: str | None = None
    memory: int | None = None
    expert_slots: int | str | None = None
    host_memory: int | None = None
    max_context: int | None = None
    routing: str | None = None


@dataclass(frozen=True)
class Speed:
    """A policy's times: of a prompt while slots are full of another's experts, of the very first, and of a step."""

    policy: str
    ttft: Seconds
    first_ttft_s: float
    tpot: Seconds
    hit_rate: float


def speed_of(costs: Costs, curves: RoutingCurves, memory: MemoryPlan, question: Question, name: str) -> Speed:
    """The speed of the policy ``name``, with slots divided evenly over the layers."""
    policy, shape = POLICIES[name], costs.model.shape
    hit_rate = curves.hit_rate(RANKED[name], memory.share, question.batch) if policy.keeps else 0.0
    step = StepSpec(
        sequences=question.batch,
        context=question.prompt + question.new_tokens // 2,
        asked=curves.in_batch(question.batch),
        hit_rate=hit_rate,
    )
    tokens = question.batch * question.prompt
    absent = memory.total_experts - memory.num_slots
    ring = ring_size(policy.prefill, shape, tokens, memory.num_slots, absent) if policy.keeps else 0
    used = _of_prompts(curves, question, shape.num_experts)
    settled = (memory.num_slots - ring) / memory.total_experts if policy.keeps else 0.0
    cold, warm = (PromptSpec(tokens, question.batch, used, share) for share in (0.0, settled))
    return Speed(
        policy=name,
        ttft=costs.prefill(policy, warm),
        first_ttft_s=costs.prefill(policy, cold).total,
        tpot=costs.decode(policy, step),
        hit_rate=hit_rate,
    )


def _of_prompts(curves: RoutingCurves, question: Question, num_experts: int) -> float:
    """Distinct experts that all prompts together use in a layer, as if each chose independently."""
    passed_over = 1 - curves.in_prompt(question.prompt) / num_experts
    return num_experts * (1 - passed_over**question.batch)
