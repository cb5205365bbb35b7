"""Plans a model on a machine: memory by part, speed by policy, and what more memory would gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from duoserve.byte_sizes import format_bytes
from duoserve.config import EngineConfig
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.budget import FreeMemory, MemoryPlan
from duoserve.experts.layout import ExpertLayout, Quantized
from duoserve.kv_cache import PAGE_TOKENS, PagedKVCache
from duoserve.loading.memory_needs import MemoryNeeds, context_of
from duoserve.models.described import DescribedModel
from duoserve.models.gpu_support import cpu_only
from duoserve.planning.formats import layout_in
from duoserve.planning.policy_speed import RANKED, Question, Speed, speed_of
from duoserve.planning.rehearsal import Rehearsal
from duoserve.planning.rehearsed import RehearsedCosts
from duoserve.planning.routing_curves import UNIFORM, RoutingCurves, curves_for
from duoserve.planning.sizes import sizes_of
from duoserve.planning.speed import Costs
from duoserve.replaying.hardware import GIB, HARDWARE, Hardware, Machine
from duoserve.scheduling.policies import POLICIES, Policy

CURVE_TOKENS = 192  # tokens of each request that hit rates were taken from
INT4_BITS = 5  # experts with at most this many bits a weight are not made smaller by int4


@dataclass(frozen=True)
class Plan:
    """The answer. ``speeds`` are by policy, the fastest decode first; ``notes`` say what was assumed."""

    hardware: Hardware
    question: Question
    layout: ExpertLayout
    memory: MemoryPlan
    speeds: Mapping[str, Speed]
    routing: str
    notes: tuple[str, ...]

    @property
    def best(self) -> Speed:
        """The policy with the least TPOT."""
        return next(iter(self.speeds.values()))


@dataclass(frozen=True)
class Planner:
    """Makes plans of one model, known by ``name``. Raises MemoryBudgetError, with the arithmetic, if it cannot run.

    ``rehearsals`` are by the name of the hardware that they were made on, and are used for experts of the same size.
    ``copy_threads`` threads read from the disk of a machine that computes on its CPU.
    """

    name: str
    model: DescribedModel
    rehearsals: Mapping[str, Rehearsal] = field(default_factory=dict)
    copy_threads: int = EngineConfig().copy_threads

    def plan(self, hardware: Hardware, question: Question) -> Plan:
        """How memory is divided, and how fast each policy is."""
        layout = layout_in(self.model.config, question.form, self.model.config.dtype)
        memory = self._memory(hardware, question, layout)
        curves = curves_for(self.model.config.num_experts, self.model.config.top_k, question.routing or self.name)
        costs = self._costs(hardware, layout, memory)
        names = [name for name in RANKED if _suits(POLICIES[name], memory)]
        speeds = sorted((speed_of(costs, curves, memory, question, name) for name in names), key=_by_tpot)
        notes = (
            *self._routing_notes(question, curves),
            *self._notes(hardware, question, memory),
            *_cost_notes(layout, costs),
        )
        return Plan(hardware, question, layout, memory, {s.policy: s for s in speeds}, curves.name, notes)

    def costs(self, plan: Plan) -> Costs:
        """The costs from which the times of ``plan`` were computed."""
        return self._costs(plan.hardware, plan.layout, plan.memory)

    def one_gib_more(self, plan: Plan) -> Plan | None:
        """The plan with a GiB more for everything; None if all experts have slots already."""
        if plan.memory.all_in_slots:
            return None
        larger = replace(plan.hardware, memory_bytes=plan.hardware.memory_bytes + GIB)
        return self.plan(larger, replace(plan.question, memory=plan.memory.total_bytes + GIB, expert_slots=None))

    def in_int4(self, plan: Plan) -> Plan | None:
        """The plan with experts in int4; None if they are as small already or cannot be int4, and on a CPU.

        A CPU decodes int4 before it multiplies, and how long that takes is not known here.
        """
        if plan.hardware.host_computes:
            return None
        if 8 * plan.layout.slot_bytes <= INT4_BITS * 3 * plan.layout.hidden * plan.layout.intermediate:
            return None
        try:
            return self.plan(plan.hardware, replace(plan.question, form="int4"))
        except (ConfigError, MemoryBudgetError):
            return None

    def _costs(self, hardware: Hardware, layout: ExpertLayout, memory: MemoryPlan) -> Costs:
        config = self.model.config
        sizes = sizes_of(self.model.family, config, layout, config.dtype)
        ram_share = 1.0 if memory.all_in_slots else memory.host_experts / memory.total_experts
        costs = Costs(Machine(hardware, sizes.layer), sizes, ram_share, copy_threads=self.copy_threads)
        rehearsal = self.rehearsals.get(hardware.name)
        if rehearsal is None or rehearsal.slot_bytes != layout.slot_bytes:
            return costs
        return RehearsedCosts.of(costs, rehearsal)

    def _memory(self, hardware: Hardware, question: Question, layout: ExpertLayout) -> MemoryPlan:
        config, on_cpu = self.model.config, hardware.host_computes
        needs = MemoryNeeds(
            config=config,
            layout=layout,
            dense_bytes=self.model.family.dense_bytes(config, config.dtype),
            dtype=config.dtype,
            device=torch.device("cpu" if on_cpu else "cuda"),
            max_context=self._context(question),
        )
        host_bytes = hardware.host_bytes
        if _is_card(hardware):  # its RAM is only assumed, so there may be as much as the question names
            host_bytes = max(host_bytes, question.host_memory or 0)
        wanted = EngineConfig(
            memory=question.memory, expert_slots=question.expert_slots, host_memory=question.host_memory
        )
        return needs.plan(wanted, FreeMemory(hardware.memory_bytes, None if on_cpu else host_bytes))

    def _context(self, question: Question) -> int:
        """Tokens of the KV cache; raises ConfigError if the sequences are too long for it, or for the model."""
        config, per_sequence = self.model.config, question.prompt + question.new_tokens
        if per_sequence > config.num_positions:
            raise ConfigError(
                f"a prompt of {question.prompt} tokens and {question.new_tokens} new ones are more than the "
                f"{config.num_positions} positions that the model knows: shorten either"
            )
        needed = question.batch * PagedKVCache.whole_pages(per_sequence)
        context = question.max_context or max(context_of(config, None), needed)
        if PagedKVCache.whole_pages(context) < needed:
            raise ConfigError(
                f"max_context={context} holds fewer tokens than {question.batch} x {per_sequence} in whole pages of "
                f"{PAGE_TOKENS} tokens: raise it to at least {needed}"
            )
        return context

    def _routing_notes(self, question: Question, curves: RoutingCurves) -> list[str]:
        config, notes = self.model.config, []
        if curves.name == UNIFORM:
            notes.append("hit rates are those of chance: every expert as likely as any other, whatever came before")
        elif curves.name != self.name:
            ours, theirs = (config.num_experts, config.top_k), (curves.raw["num_experts"], curves.raw["top_k"])
            nearest = "" if question.routing else ", the nearest model whose routing is known"
            notes.append(
                f"hit rates are those of {curves.name} ({theirs[0]} experts, top-{theirs[1]}){nearest}; "
                f"this one has {ours[0]}, top-{ours[1]}"
            )
        if question.new_tokens < CURVE_TOKENS / 2 and curves.name != UNIFORM:
            notes.append(f"hit rates are means over {CURVE_TOKENS} new tokens: so few as here miss more")
        return notes

    def _notes(self, hardware: Hardware, question: Question, memory: MemoryPlan) -> list[str]:
        config, notes = self.model.config, []
        if not hardware.host_computes and question.host_memory is None and not memory.all_in_slots:
            notes.append(f"assumed: {format_bytes(hardware.host_bytes)} of RAM, of which 80 % hold experts")
        if _is_card(hardware):
            notes.append(
                "rates are the makers' peaks and others' figures of links: nothing was measured on this machine"
            )
        if not hardware.host_computes and (what := cpu_only(config)) is not None:
            notes.append(f"duoserve runs {what} on CPUs only so far: this is what a GPU would allow")
        return notes


def _cost_notes(layout: ExpertLayout, costs: Costs) -> list[str]:
    if isinstance(costs, RehearsedCosts):
        return ["times are those of made-up layers of these sizes, run on this machine"]
    if costs.machine.hardware.host_computes and isinstance(layout.stored, Quantized):
        return ["a CPU decodes quantized experts before it multiplies: the time of that is left out"]
    return []


def _is_card(hardware: Hardware) -> bool:
    """Whether ``hardware`` is a card, with rates that were not measured here."""
    return hardware.name.partition("@")[0] in HARDWARE


def _suits(policy: Policy, memory: MemoryPlan) -> bool:
    """Whether the policy suits the memory: "resident" if all experts have slots, the others if not."""
    return policy.all_resident == memory.all_in_slots


def _by_tpot(speed: Speed) -> tuple[float, float]:
    return speed.tpot.total, speed.ttft.total
