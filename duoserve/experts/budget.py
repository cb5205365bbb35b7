"""How fast memory is divided: a plan that is checked before anything is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from duoserve.byte_sizes import format_bytes
from duoserve.config import EngineConfig
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.layout import ExpertLayout
from duoserve.number_checks import is_integer

SHARE = re.compile(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", re.ASCII)
COMFORTABLE = Fraction(4, 5)  # of the free RAM, where nobody said how much


def slot_count(slots: int | str, total_experts: int) -> int:
    """The slots in a count, or in a share of all experts such as "25%" (to the nearest slot); else ConfigError."""
    match = SHARE.fullmatch(slots) if isinstance(slots, str) else None
    if match and 0 < Decimal(match[1]) <= 100:
        return round(Decimal(match[1]) * total_experts / 100)
    if not is_integer(slots):
        raise ConfigError(f"expert_slots={slots!r}: give a count, or a share of all experts such as '25%'")
    return slots


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that may still be taken where the slots are, and in the RAM behind; None there: the slots are in RAM."""

    device_bytes: int
    host_bytes: int | None = None

    @property
    def name(self) -> str:
        """What the memory of the slots is called."""
        return "RAM" if self.host_bytes is None else "GPU memory"

    @property
    def waiting_bytes(self) -> int:
        """RAM for experts that wait, where nobody said how much: behind a GPU what is comfortable, else none."""
        return 0 if self.host_bytes is None else int(self.host_bytes * COMFORTABLE)

    def taken(self, plan: MemoryPlan) -> int:
        """How much of ``device_bytes`` the plan takes: on a CPU the rows that wait lie there too."""
        return plan.total_bytes + (plan.host_bytes if self.host_bytes is None else 0)


@dataclass(frozen=True)
class MemoryPlan:
    """What memory holds once the model is loaded: counts of experts, and bytes.

    ``host_experts`` is how many experts' rows wait in host RAM, beside those in the slots; 0 when all stay in a slot.
    """

    num_slots: int
    host_experts: int
    total_experts: int
    slot_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no number of slots changes."""
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes on the device: what ``memory`` caps."""
        return self.num_slots * self.slot_bytes + self.fixed_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the rows that wait in host RAM."""
        return self.host_experts * self.slot_bytes

    @property
    def share(self) -> float:
        """Slots per expert, 0 to 1."""
        return self.num_slots / self.total_experts

    @property
    def all_in_slots(self) -> bool:
        """Whether there is a slot for every expert."""
        return self.num_slots == self.total_experts

    def __str__(self) -> str:
        """The arithmetic, a line for each part."""
        slots = f"{self.num_slots} slots x {self.slot_bytes} B, {self.share:.1%} of {self.total_experts} experts"
        parts = [
            ("expert slots", self.num_slots * self.slot_bytes, f"  ({slots})"),
            ("dense weights", self.dense_bytes, ""),
            ("KV cache", self.kv_bytes, ""),
            ("workspace", self.workspace_bytes, ""),
            ("total", self.total_bytes, ""),
        ]
        if self.host_experts:
            parts.append(("in host RAM", self.host_bytes, f"  ({self.host_experts} experts x {self.slot_bytes} B)"))
        return "\n".join(f"{name:<14}{format_bytes(nbytes):>12}{note}" for name, nbytes, note in parts)


def plan_memory(  # noqa: PLR0913
    *,
    layout: ExpertLayout,
    num_layers: int,
    num_experts: int,
    top_k: int,
    dense_bytes: int,
    kv_bytes: int,
    workspace_bytes: int,
    wanted: EngineConfig,
    free: FreeMemory,
    needs_all: bool = False,
    keeps: bool = True,
) -> MemoryPlan:
    """Slots from ``expert_slots``, ``expert_memory`` or ``memory``, else as many as fit in 80 % of what is free.

    ``num_layers`` counts MoE layers, ``num_experts`` experts a layer; ``needs_all`` asks for a slot for each of them.
    Unless it ``keeps`` experts in their slots, they wait in host RAM even if each has a slot: all are read again.
    Raises MemoryBudgetError, with the arithmetic and the figure that would do, below ``top_k`` + 1 slots (all, with
    ``needs_all``) and above what is ``free``.
    """
    total = num_layers * num_experts
    least = total if needs_all else min(top_k + 1, total)
    waiting = _waiting(wanted, layout, total, free)
    smallest = MemoryPlan(
        num_slots=least,
        host_experts=0 if keeps and least == total else waiting,
        total_experts=total,
        slot_bytes=layout.slot_bytes,
        dense_bytes=dense_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes,
    )
    why = f"{num_layers} layers x {num_experts} experts, all resident" if needs_all else f"top-{top_k} and one prefetch"
    _check_smallest_fits(smallest, why, free)
    slots = _slots_given(smallest, wanted, free, keeps)
    if slots < least:
        raise MemoryBudgetError(_too_few(smallest, why, slots, wanted, free))
    slots = min(slots, total)
    plan = replace(smallest, num_slots=slots, host_experts=0 if keeps and slots == total else waiting)
    _check_fits(plan, smallest, wanted, free)
    return plan


def _waiting(wanted: EngineConfig, layout: ExpertLayout, total: int, free: FreeMemory) -> int:
    """The experts that may wait in host RAM, where not all stay in slots."""
    waiting_bytes = free.waiting_bytes if wanted.host_memory is None else wanted.host_memory
    return min(waiting_bytes // layout.slot_bytes, total)


def _exact(nbytes: int) -> str:
    return f"{nbytes} bytes ({format_bytes(nbytes)})" if abs(nbytes) >= 1024 else f"{nbytes} bytes"


def _terms(plan: MemoryPlan, free: FreeMemory) -> str:
    """What ``free.taken(plan)`` is the sum of."""
    terms = f"{plan.num_slots} slots x {_exact(plan.slot_bytes)}"
    terms += f" + dense weights {_exact(plan.dense_bytes)} + KV cache {_exact(plan.kv_bytes)}"
    terms += f" + workspace {_exact(plan.workspace_bytes)}"
    waiting = plan.host_experts and free.host_bytes is None
    return terms + (f" + {plan.host_experts} experts in host RAM {_exact(plan.host_bytes)}" if waiting else "")


def _check_smallest_fits(smallest: MemoryPlan, why: str, free: FreeMemory) -> None:
    if (needed := free.taken(smallest)) > free.device_bytes:
        raise MemoryBudgetError(
            f"at least {needed} bytes of {free.name} must be free ({format_bytes(needed)}: {_terms(smallest, free)}; "
            f"slots for {why}), but {_exact(free.device_bytes)} are: free some, or lower max_context or host_memory"
        )


def _check_fits(plan: MemoryPlan, smallest: MemoryPlan, wanted: EngineConfig, free: FreeMemory) -> None:
    if free.taken(plan) > free.device_bytes:
        raise MemoryBudgetError(_too_much(plan, smallest, wanted, free))
    if free.host_bytes is not None and plan.host_bytes > free.host_bytes:
        raise MemoryBudgetError(
            f"{plan.host_experts} experts x {_exact(plan.slot_bytes)} = {_exact(plan.host_bytes)} of host memory, but "
            f"{_exact(free.host_bytes)} of RAM are free: lower host_memory to at most {_exact(free.host_bytes)}"
        )


def _slots_given(smallest: MemoryPlan, wanted: EngineConfig, free: FreeMemory, keeps: bool) -> int:
    """The slots that the one knob in use asks for; it may be fewer than none."""
    if wanted.expert_slots is not None:
        return slot_count(wanted.expert_slots, smallest.total_experts)
    if wanted.expert_memory is not None:
        return wanted.expert_memory // smallest.slot_bytes
    if wanted.memory is not None:
        return (wanted.memory - smallest.fixed_bytes) // smallest.slot_bytes
    room = int(free.device_bytes * COMFORTABLE) - smallest.fixed_bytes
    if keeps and room >= smallest.total_experts * smallest.slot_bytes:  # then none waits
        return smallest.total_experts
    return (room + smallest.total_bytes - free.taken(smallest)) // smallest.slot_bytes


def _too_few(smallest: MemoryPlan, why: str, slots: int, wanted: EngineConfig, free: FreeMemory) -> str:
    """What was given, what is needed, and the figure that would do."""
    least, pool = smallest.num_slots, smallest.num_slots * smallest.slot_bytes
    terms = _terms(smallest, free)
    short = f"{max(0, slots)} of the {least} slots that are needed ({why})"
    if wanted.expert_slots is not None:
        return f"expert_slots={wanted.expert_slots} gives {short}: raise expert_slots to at least {least}"
    if wanted.expert_memory is not None:
        given, need = f"expert_memory={_exact(wanted.expert_memory)}", f"{least} slots x {_exact(smallest.slot_bytes)}"
        return f"{given} gives {short}: {need}; raise expert_memory to at least {_exact(pool)}"
    if wanted.memory is not None:
        given, enough = f"memory={_exact(wanted.memory)}", _exact(smallest.total_bytes)
        return f"{given} gives {short}: {terms}; raise memory to at least {enough} or lower max_context"
    given = f"80 % of the {_exact(free.device_bytes)} of free {free.name}"
    remedy = f"lower max_context or, to use more of it, set expert_slots to at least {least}"
    return f"{given} gives {short}: {terms}; {remedy}"


def _too_much(plan: MemoryPlan, smallest: MemoryPlan, wanted: EngineConfig, free: FreeMemory) -> str:
    """The plan's arithmetic, what is free, and the most that would fit."""
    room = free.device_bytes - (free.taken(smallest) - smallest.total_bytes)
    fits = (room - smallest.fixed_bytes) // plan.slot_bytes
    if wanted.expert_slots is not None:
        remedy = f"lower expert_slots to at most {fits}"
    elif wanted.expert_memory is not None:
        remedy = f"lower expert_memory to at most {_exact(fits * plan.slot_bytes)}"
    else:
        remedy = f"lower memory to at most {_exact(room)}"
    needed, given = _exact(free.taken(plan)), _exact(free.device_bytes)
    return f"{_terms(plan, free)} = {needed}, but {given} of {free.name} are free: {remedy}"
