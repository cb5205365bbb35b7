"""How fast memory is divided: sizes as people write them, and the plan that is checked before anything is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from duoserve.config import EngineConfig
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.layout import ExpertLayout

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}
SIZE = re.compile(r"\s*(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?I?B|)\s*", re.ASCII | re.IGNORECASE)
SHARE = re.compile(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", re.ASCII)
MAX_BYTES = 2**63 - 1
COMFORTABLE = Fraction(4, 5)  # of the free RAM, where nobody said how much


def parse_bytes(size: int | str) -> int:
    """Bytes in ``size``: an integer, or text such as "4GiB" (1024s), "500MB" (1000s) or "4096"; else ConfigError."""
    match = SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = UNITS.get(match[2].upper()) if match else None
    if match and unit:
        size = int(Decimal(match[1]) * unit)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BYTES:
        raise ConfigError(
            f"{size!r} is not an amount of memory: give bytes, or text such as '4GiB', '1.5GiB' or '500MB'"
        )
    return size


def format_bytes(nbytes: int) -> str:
    """``nbytes`` for people, in 1024s and to two decimals: "512 B", "1.25 GiB"."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    amount = nbytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"


def slot_count(slots: int | str, total_experts: int) -> int:
    """The slots in a count, or in a share of all experts such as "25%" (to the nearest slot); else ConfigError."""
    match = SHARE.fullmatch(slots) if isinstance(slots, str) else None
    if match and 0 < Decimal(match[1]) <= 100:
        return round(Decimal(match[1]) * total_experts / 100)
    if not isinstance(slots, int) or isinstance(slots, bool):
        raise ConfigError(f"expert_slots={slots!r}: give a count, or a share of all experts such as '25%'")
    return slots


@dataclass(frozen=True)
class MemoryPlan:
    """What memory holds once the model is loaded: counts of experts, and bytes.

    ``host_experts`` is how many experts' rows wait in host RAM, beside those in the slots; 0 when all have a slot.
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
    available_bytes: int,
    needs_all: bool = False,
) -> MemoryPlan:
    """Slots from ``expert_slots``, ``expert_memory`` or ``memory``, else as many as fit in 80 % of the free RAM.

    ``num_layers`` counts MoE layers, ``num_experts`` experts a layer; ``needs_all`` asks for a slot for each of them.
    Raises MemoryBudgetError, with the arithmetic and the figure that would do, below ``top_k`` + 1 slots (all, with
    ``needs_all``) and above the ``available_bytes`` of RAM.
    """
    total = num_layers * num_experts
    least = total if needs_all else min(top_k + 1, total)
    smallest = MemoryPlan(
        num_slots=least,
        host_experts=_host_experts(wanted, layout, least, total),
        total_experts=total,
        slot_bytes=layout.slot_bytes,
        dense_bytes=dense_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes,
    )
    why = f"{num_layers} layers x {num_experts} experts, all resident" if needs_all else f"top-{top_k} and one prefetch"
    _check_smallest_fits(smallest, why, available_bytes)
    slots = _slots_given(smallest, wanted, available_bytes)
    if slots < least:
        raise MemoryBudgetError(_too_few(smallest, why, slots, wanted, available_bytes))
    slots = min(slots, total)
    plan = replace(smallest, num_slots=slots, host_experts=_host_experts(wanted, layout, slots, total))
    if _ram(plan) > available_bytes:
        raise MemoryBudgetError(_too_much(plan, smallest, wanted, available_bytes))
    return plan


def _host_experts(wanted: EngineConfig, layout: ExpertLayout, slots: int, total: int) -> int:
    return 0 if slots >= total else min((wanted.host_memory or 0) // layout.slot_bytes, total)


def _ram(plan: MemoryPlan) -> int:
    """On a CPU the device's memory and the host's are the same RAM."""
    return plan.total_bytes + plan.host_bytes


def _exact(nbytes: int) -> str:
    return f"{nbytes} bytes ({format_bytes(nbytes)})" if abs(nbytes) >= 1024 else f"{nbytes} bytes"


def _terms(plan: MemoryPlan) -> str:
    terms = f"{plan.num_slots} slots x {_exact(plan.slot_bytes)}"
    terms += f" + dense weights {_exact(plan.dense_bytes)} + KV cache {_exact(plan.kv_bytes)}"
    terms += f" + workspace {_exact(plan.workspace_bytes)}"
    return terms + (
        f" + {plan.host_experts} experts in host RAM {_exact(plan.host_bytes)}" if plan.host_experts else ""
    )


def _check_smallest_fits(smallest: MemoryPlan, why: str, available: int) -> None:
    if _ram(smallest) > available:
        raise MemoryBudgetError(
            f"at least {_ram(smallest)} bytes of RAM must be free ({format_bytes(_ram(smallest))}: {_terms(smallest)}; "
            f"slots for {why}), but {_exact(available)} are: free some, or lower max_context or host_memory"
        )


def _slots_given(smallest: MemoryPlan, wanted: EngineConfig, available: int) -> int:
    """The slots that the one knob in use asks for; it may be fewer than none."""
    if wanted.expert_slots is not None:
        return slot_count(wanted.expert_slots, smallest.total_experts)
    if wanted.expert_memory is not None:
        return wanted.expert_memory // smallest.slot_bytes
    if wanted.memory is not None:
        return (wanted.memory - smallest.fixed_bytes) // smallest.slot_bytes
    room = int(available * COMFORTABLE) - smallest.fixed_bytes
    if room >= smallest.total_experts * smallest.slot_bytes:
        return smallest.total_experts
    return (room - smallest.host_bytes) // smallest.slot_bytes


def _too_few(smallest: MemoryPlan, why: str, slots: int, wanted: EngineConfig, available: int) -> str:
    """What was given, what is needed, and the figure that would do."""
    least, pool = smallest.num_slots, smallest.num_slots * smallest.slot_bytes
    short = f"{max(0, slots)} of the {least} slots that are needed ({why})"
    if wanted.expert_slots is not None:
        return f"expert_slots={wanted.expert_slots} gives {short}: raise expert_slots to at least {least}"
    if wanted.expert_memory is not None:
        given, need = f"expert_memory={_exact(wanted.expert_memory)}", f"{least} slots x {_exact(smallest.slot_bytes)}"
        return f"{given} gives {short}: {need}; raise expert_memory to at least {_exact(pool)}"
    if wanted.memory is not None:
        given, enough = f"memory={_exact(wanted.memory)}", _exact(smallest.total_bytes)
        return f"{given} gives {short}: {_terms(smallest)}; raise memory to at least {enough}"
    given = f"80 % of the {_exact(available)} of free RAM"
    return f"{given} gives {short}: {_terms(smallest)}; to use more of it, set expert_slots to at least {least}"


def _too_much(plan: MemoryPlan, smallest: MemoryPlan, wanted: EngineConfig, available: int) -> str:
    """The plan's arithmetic, what is free, and the most that would fit."""
    fits = (available - smallest.fixed_bytes - smallest.host_bytes) // plan.slot_bytes
    if wanted.expert_slots is not None:
        remedy = f"lower expert_slots to at most {fits}"
    elif wanted.expert_memory is not None:
        remedy = f"lower expert_memory to at most {_exact(fits * plan.slot_bytes)}"
    else:
        remedy = f"lower memory to at most {_exact(available - smallest.host_bytes)}"
    return f"{_terms(plan)} = {_exact(_ram(plan))}, but {_exact(available)} of RAM are free: {remedy}"
