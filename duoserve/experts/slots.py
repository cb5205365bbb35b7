"""The slots: fixed buffers of fast memory for one expert each (SlotPool), and which expert is in which (SlotTable).

B bytes of one row, E experts, L layers, S slots.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from duoserve.errors import IntegrityError
from duoserve.experts.device import CPU, new_rows
from duoserve.experts.layout import ExpertId, ExpertLayout

_POISON = 0xFF  # sixteen or thirty-two set bits are a NaN in bfloat16, float16 and float32


class SlotState(IntEnum):
    """What a slot holds: nothing, an expert whose bytes are on their way, or an expert that kernels may read."""

    EMPTY = 0
    LOADING = 1
    READY = 2


class SlotTable:
    """Which expert is in which slot: pure bookkeeping, the truth on the host, for one thread.

    EMPTY -> begin_load -> LOADING -> finish_load -> READY -> evict -> EMPTY, or LOADING -> abort_load -> EMPTY. Only a
    READY slot can be held, and a held one cannot be evicted. Any other transition raises IntegrityError and changes
    nothing. Transitions cost the same whatever the number of slots, but for one short memory move.

    ``slots`` has a dict for each layer, of the experts that are LOADING or READY and their slots, in the order in
    which they began to load. Others may only read it.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: list[dict[int, int]] = [{} for _ in range(num_layers)]
        self._experts: list[ExpertId | None] = [None] * num_slots
        self._states = [SlotState.EMPTY] * num_slots
        self._holds = [0] * num_slots
        self._empty = list(range(num_slots))  # ascending
        self._ready_LE = np.full((num_layers, num_experts), -1, dtype=np.int32)

    def slot_of(self, expert: ExpertId) -> int:
        """The slot that holds or is loading this expert, -1 if none."""
        return self.slots[expert.layer].get(expert.expert, -1)

    def expert_in(self, slot: int) -> ExpertId | None:
        """The expert in this slot, arrived or not; None if it is EMPTY."""
        self._check_slot(slot)
        return self._experts[slot]

    def state(self, slot: int) -> SlotState:
        """The state of this slot."""
        self._check_slot(slot)
        return self._states[slot]

    def holds(self, slot: int) -> int:
        """How many holds keep this slot from eviction."""
        self._check_slot(slot)
        return self._holds[slot]

    def is_ready(self, expert: ExpertId) -> bool:
        """Whether kernels may read this expert now."""
        slot = self.slot_of(expert)
        return slot >= 0 and self._states[slot] is SlotState.READY

    def empty_slots(self) -> list[int]:
        """The EMPTY slots, lowest first."""
        return self._empty.copy()

    def first_empty(self) -> int:
        """The lowest EMPTY slot, -1 if there is none."""
        return self._empty[0] if self._empty else -1

    def ready(self) -> list[tuple[int, ExpertId]]:
        """The READY slots, lowest first, with their experts."""
        return [
            (slot, expert)
            for slot, expert in enumerate(self._experts)
            if expert is not None and self._states[slot] is SlotState.READY
        ]

    @property
    def ready_LE(self) -> np.ndarray:
        """int32 [L, E]: the slot of each READY expert, -1 for the others. A live view: never write to it."""
        return self._ready_LE

    def begin_load(self, expert: ExpertId, slot: int) -> None:
        """EMPTY -> LOADING; the expert must be in no slot yet."""
        self._check_expert(expert)
        self._require(slot, SlotState.EMPTY, "begin_load")
        here = self.slots[expert.layer]
        if expert.expert in here:
            raise IntegrityError(
                f"begin_load of {expert} into slot {slot}: it is already in {self._describe(here[expert.expert])}"
            )
        del self._empty[bisect_left(self._empty, slot)]
        here[expert.expert] = slot
        self._experts[slot] = expert
        self._states[slot] = SlotState.LOADING

    def finish_load(self, slot: int) -> None:
        """LOADING -> READY: the bytes have arrived."""
        expert = self._occupant(slot, SlotState.LOADING, "finish_load")
        self._states[slot] = SlotState.READY
        self._ready_LE[expert] = slot

    def abort_load(self, slot: int) -> None:
        """LOADING -> EMPTY: the copy failed or was cancelled."""
        self._vacate(slot, self._occupant(slot, SlotState.LOADING, "abort_load"))

    def evict(self, slot: int) -> None:
        """READY -> EMPTY; the slot must not be held."""
        expert = self._occupant(slot, SlotState.READY, "evict")
        if self._holds[slot]:
            raise IntegrityError(f"evict of {self._describe(slot)}: it is held")
        self._vacate(slot, expert)

    def hold(self, slot: int) -> None:
        """Keeps a READY slot from eviction until as many unhold() calls."""
        self._require(slot, SlotState.READY, "hold")
        self._holds[slot] += 1

    def unhold(self, slot: int) -> None:
        """Takes one hold back."""
        if not (0 <= slot < self.num_slots and self._holds[slot]):
            self._check_slot(slot)
            raise IntegrityError(f"unhold of {self._describe(slot)}: it is not held")
        self._holds[slot] -= 1

    def held(self) -> list[int]:
        """The slots that are held, lowest first."""
        return [slot for slot, holds in enumerate(self._holds) if holds]

    def reset(self) -> None:
        """Takes back all holds and aborts all loads, behind a pass that was cut short."""
        self._holds = [0] * self.num_slots
        for slot, state in enumerate(self._states):
            if state is SlotState.LOADING:
                self.abort_load(slot)

    def check_integrity(self) -> None:
        """Compares every record with every other, O(L * E + S); IntegrityError says what disagrees."""
        in_slots = {expert: slot for slot, expert in enumerate(self._experts) if expert is not None}
        looked_up = {ExpertId(layer, expert): here[expert] for layer, here in enumerate(self.slots) for expert in here}
        if in_slots != looked_up:
            raise IntegrityError(f"slots hold {in_slots}, but experts are looked up as {looked_up}")
        for slot in range(self.num_slots):
            self._check_record(slot)
        empty = [slot for slot, state in enumerate(self._states) if state is SlotState.EMPTY]
        if empty != self._empty:
            raise IntegrityError(f"slots {empty} are EMPTY, but the free list is {self._empty}")
        ready_LE = np.full_like(self._ready_LE, -1)
        for slot, expert in self.ready():
            ready_LE[expert] = slot
        if not np.array_equal(ready_LE, self._ready_LE):
            wrong = np.argwhere(ready_LE != self._ready_LE)[0].tolist()
            raise IntegrityError(f"the kernels' row is wrong for {ExpertId(*wrong)}")

    def _check_record(self, slot: int) -> None:
        empty = self._states[slot] is SlotState.EMPTY
        if empty != (self._experts[slot] is None):
            raise IntegrityError(f"{self._describe(slot)}: only an EMPTY slot has no expert")
        holds = self._holds[slot]
        if holds < 0 or (holds and self._states[slot] is not SlotState.READY):
            raise IntegrityError(f"{self._describe(slot)}: only a READY slot can be held")

    def _vacate(self, slot: int, expert: ExpertId) -> None:
        """Calls nothing before the last line: Python lets interrupts in at calls, and the records must stay whole."""
        self._ready_LE[expert] = -1
        del self.slots[expert.layer][expert.expert]
        self._experts[slot] = None
        self._states[slot] = SlotState.EMPTY
        insort(self._empty, slot)

    def _occupant(self, slot: int, state: SlotState, action: str) -> ExpertId:
        """The expert in ``slot``, which must be in ``state`` for this ``action``."""
        self._require(slot, state, action)
        expert = self._experts[slot]
        if expert is None:
            raise IntegrityError(f"{action} of {self._describe(slot)}: only an EMPTY slot has no expert")
        return expert

    def _require(self, slot: int, state: SlotState, action: str) -> None:
        if not (0 <= slot < self.num_slots and self._states[slot] is state):
            self._check_slot(slot)
            raise IntegrityError(f"{action} of {self._describe(slot)}: it must be {state.name}")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise IntegrityError(f"slot {slot} is not one of the {self.num_slots} slots")

    def _check_expert(self, expert: ExpertId) -> None:
        layers, experts = self._ready_LE.shape
        if not (0 <= expert.layer < layers and 0 <= expert.expert < experts):
            raise IntegrityError(f"{expert} is not one of {layers} layers of {experts} experts")

    def _describe(self, slot: int) -> str:
        expert = self._experts[slot]
        return f"slot {slot} ({self._states[slot].name}, {expert or 'no expert'}, {self._holds[slot]} holds)"


class SlotPool:
    """The memory of the slots: uint8 rows [S, slot_bytes] on ``device``, allocated at once.

    On a CPU each row lies on a page boundary and has been touched. With ``poison`` every byte that no copy has written
    reads as NaN, which shows a kernel that read too early. MemoryBudgetError when the memory cannot be had.
    """

    def __init__(self, num_slots: int, layout: ExpertLayout, poison: bool = False, device: torch.device = CPU) -> None:
        self.num_slots = num_slots
        self.rows_SB = new_rows(num_slots, layout.slot_bytes, device)
        self.weights = layout.weights(self.rows_SB)
        self._poison = poison
        if poison:
            self.rows_SB.fill_(_POISON)

    def row(self, slot: int) -> Tensor:
        """The bytes of one slot: a uint8 view [slot_bytes]."""
        return self.rows_SB[slot]

    def scrub(self, slot: int) -> bool:
        """Makes a freed slot read as NaN if the pool is poisoned; returns whether it is.

        On a GPU that is done behind the kernels that were launched before, and no copy may come before it.
        """
        if self._poison:
            self.rows_SB[slot].fill_(_POISON)
        return self._poison
