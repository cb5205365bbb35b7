"""How fast memory is divided: a plan that is checked before anything is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from duoserve.byte_sizes import format_bytes
from duoserve.config import EngineConfig
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.number_checks import is_integer

SHARE = re.compile(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", re.ASCII)
COMFORTABLE = Fraction(4, 5)  # of the free memory, where no setting says how much


def slot_count(slots: int | str, total_experts: int) -> int:
    """The slots in a count, or in a share of all experts such as "25%" (to the nearest slot); else ConfigError."""
    match = SHARE.fullmatch(slots) if isinstance(slots, str) else None
    if match and 0 < Decimal(match[1]) <= 100:
        return round(Decimal(match[1]) * total_experts / 100)
    if not is_integer(slots):
        raise ConfigError(f"expert_slots={slots!r}: give a count, or a share of all experts such as '25%'")
    return int(slots)


@dataclass(frozen=True)
class FreeMemory:
    """How many bytes may still be taken: ``device_bytes`` where the slots are, ``host_bytes`` in the RAM behind a GPU.

    ``host_bytes`` is None if the slots are in RAM themselves.
    """

    device_bytes: int
    host_bytes: int | None = None

    @property
    def name(self) -> str:
        """What the memory of the slots is called."""
        return "RAM" if self.host_bytes is None else "GPU memory"

    @property
    def waiting_bytes(self) -> int:
        """Bytes of RAM for waiting experts, if no setting says how many: behind a GPU a comfortable part, else none."""
        return 0 if self.host_bytes is None else int(self.host_bytes * COMFORTABLE)

    def taken(self, plan: MemoryPlan) -> int:
        """How many of ``device_bytes`` the plan takes; on a CPU this includes the rows that wait in the same memory."""
        return plan.total_bytes + (plan.host_bytes if self.host_bytes is None else 0)


@dataclass(frozen=True)
class MemoryPlan:
    """What memory holds once the model is loaded: counts of experts, and bytes.

    ``host_experts`` is how many experts' rows wait in host RAM, beside those in the slots. With ``read_once`` that is
    none: each expert is read into a slot of its own, and stays there.
    """

    num_slots: int
    host_experts: int
    total_experts: int
    slot_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    read_once: bool = False

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

    @property
    def all_in_ram(self) -> bool:
        """Whether every expert's row waits in host RAM."""
        return self.host_experts == self.total_experts

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


@dataclass(frozen=True)
class Footprint:
    """What of a model takes memory: MoE layers, experts of each, a row's bytes, and the bytes that are no expert's."""

    num_layers: int
    num_experts: int
    top_k: int
    slot_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total_experts(self) -> int:
        """The experts of all layers."""
        return self.num_layers * self.num_experts


def plan_memory(
    model: Footprint, wanted: EngineConfig, free: FreeMemory, *, needs_all: bool = False, keeps: bool = True
) -> MemoryPlan:
    """Slots from ``expert_slots``, ``expert_memory`` or ``memory``, else as many as fit in 80 % of what is free.

    ``needs_all`` asks for a slot for every expert. Unless the policy ``keeps`` experts in their slots, they wait in
    host RAM even if each has a slot: all are read again. Raises MemoryBudgetError, with the arithmetic and the figure
    that would do, below ``top_k`` + 1 slots (all, with ``needs_all``) and above what is ``free``.
    """
    total = model.total_experts
    least = total if needs_all else min(model.top_k + 1, total)
    waiting = _waiting(wanted, model, free)

    def planned(slots: int) -> MemoryPlan:
        read_once = keeps and slots == total
        return MemoryPlan(
            num_slots=slots,
            host_experts=0 if read_once else waiting,
            total_experts=total,
            slot_bytes=model.slot_bytes,
            dense_bytes=model.dense_bytes,
            kv_bytes=model.kv_bytes,
            workspace_bytes=model.workspace_bytes,
            read_once=read_once,
        )

    smallest = planned(least)
    all_of_them = f"{model.num_layers} layers x {model.num_experts} experts, all resident"
    why = all_of_them if needs_all else f"top-{model.top_k} and one prefetch"
    _check_smallest_fits(smallest, why, free)
    knob = _knob(wanted, smallest, free, keeps)
    if knob.slots < least:
        short = f"{max(0, knob.slots)} of the {least} slots that are needed ({why})"
        raise MemoryBudgetError(f"{knob.given} gives {short}: {knob.raised}")
    plan = planned(min(knob.slots, total))
    _check_fits(plan, knob, free)
    return plan


def _waiting(wanted: EngineConfig, model: Footprint, free: FreeMemory) -> int:
    """The experts that may wait in host RAM, where not all stay in slots."""
    waiting_bytes = free.waiting_bytes if wanted.host_memory is None else wanted.host_memory
    return min(waiting_bytes // model.slot_bytes, model.total_experts)


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


def _check_fits(plan: MemoryPlan, knob: _Knob, free: FreeMemory) -> None:
    if (needed := free.taken(plan)) > free.device_bytes:
        given = f"{_exact(free.device_bytes)} of {free.name}"
        raise MemoryBudgetError(f"{_terms(plan, free)} = {_exact(needed)}, but {given} are free: {knob.lowered}")
    if free.host_bytes is not None and plan.host_bytes > free.host_bytes:
        raise MemoryBudgetError(
            f"{plan.host_experts} experts x {_exact(plan.slot_bytes)} = {_exact(plan.host_bytes)} of host memory, but "
            f"{_exact(free.host_bytes)} of RAM are free: lower host_memory to at most {_exact(free.host_bytes)}"
        )


class _Knob(NamedTuple):
    """What decides how many ``slots`` there are: a setting, or how much memory is free. ``given`` shows its value.

    ``slots`` may be negative. Refusals advise ``raised`` where they are too few, and ``lowered`` where they do not fit.
    """

    given: str
    slots: int
    raised: str
    lowered: str


def _knob(wanted: EngineConfig, smallest: MemoryPlan, free: FreeMemory, keeps: bool) -> _Knob:
    """The knob that is in use; what is no slot takes as much as in the ``smallest`` plan."""
    least, row, fixed = smallest.num_slots, smallest.slot_bytes, smallest.fixed_bytes
    room = free.device_bytes - (free.taken(smallest) - smallest.total_bytes)
    fits, terms = (room - fixed) // row, _terms(smallest, free)
    if wanted.expert_slots is not None:
        given, slots = f"expert_slots={wanted.expert_slots}", slot_count(wanted.expert_slots, smallest.total_experts)
        return _Knob(given, slots, f"raise expert_slots to at least {least}", f"lower expert_slots to at most {fits}")
    if wanted.expert_memory is not None:
        given, slots = f"expert_memory={_exact(wanted.expert_memory)}", wanted.expert_memory // row
        raised = f"{least} slots x {_exact(row)}; raise expert_memory to at least {_exact(least * row)}"
        return _Knob(given, slots, raised, f"lower expert_memory to at most {_exact(fits * row)}")
    lowered = f"lower memory to at most {_exact(room)}"
    if wanted.memory is not None:
        given, slots = f"memory={_exact(wanted.memory)}", (wanted.memory - fixed) // row
        raised = f"{terms}; raise memory to at least {_exact(smallest.total_bytes)} or lower max_context"
        return _Knob(given, slots, raised, lowered)
    given = f"80 % of the {_exact(free.device_bytes)} of free {free.name}"
    raised = f"{terms}; lower max_context or, to use more of it, set expert_slots to at least {least}"
    return _Knob(given, _comfortable_slots(smallest, free, keeps), raised, lowered)


def _comfortable_slots(smallest: MemoryPlan, free: FreeMemory, keeps: bool) -> int:
    """The slots where no setting says how many, or how much memory they may take."""
    room = int(free.device_bytes * COMFORTABLE) - smallest.fixed_bytes
    if keeps and room >= smallest.total_experts * smallest.slot_bytes:  # then none waits
        return smallest.total_experts
    return (room + smallest.total_bytes - free.taken(smallest)) // smallest.slot_bytes
