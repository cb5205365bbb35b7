"""The slots: which transitions are legal, by hand and against a model, and memory that is poisoned until written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from duoserve.errors import IntegrityError
from duoserve.experts.layout import ExpertId, ExpertLayout
from duoserve.experts.slots import SlotPool, SlotState, SlotTable
from tests.helpers.fakes import SMALL

LAYERS, EXPERTS, SLOTS = 2, 3, 4
A, B = ExpertId(0, 1), ExpertId(1, 2)


def table_with(*, loading: int | None = None, ready: int | None = None) -> SlotTable:
    """A table with expert A LOADING in one slot and B READY in another, if asked for."""
    table = SlotTable(LAYERS, EXPERTS, SLOTS)
    if loading is not None:
        table.begin_load(A, loading)
    if ready is not None:
        table.begin_load(B, ready)
        table.finish_load(ready)
    return table


def test_an_expert_goes_through_the_states() -> None:
    table = SlotTable(LAYERS, EXPERTS, SLOTS)
    assert table.slot_of(A) == -1 and table.state(2) is SlotState.EMPTY and table.expert_in(2) is None
    table.begin_load(A, 2)
    assert table.slot_of(A) == 2 and table.state(2) is SlotState.LOADING and table.expert_in(2) == A
    assert not table.is_ready(A) and table.ready_LE[0].tolist() == [-1, -1, -1] and table.ready() == []
    table.finish_load(2)
    assert table.is_ready(A) and table.ready_LE[0].tolist() == [-1, 2, -1] and table.ready() == [(2, A)]
    table.evict(2)
    assert table.slot_of(A) == -1 and table.ready_LE[0].tolist() == [-1, -1, -1]
    table.check_integrity()


def test_an_aborted_load_leaves_the_slot_empty() -> None:
    table = table_with(loading=3)
    table.abort_load(3)
    assert table.slot_of(A) == -1 and table.expert_in(3) is None and table.empty_slots() == [0, 1, 2, 3]
    table.begin_load(A, 0)
    table.check_integrity()


def test_lists_are_in_the_order_of_slots() -> None:
    table = SlotTable(LAYERS, EXPERTS, SLOTS)
    for slot, expert in [(3, A), (0, B), (1, ExpertId(0, 0))]:
        table.begin_load(expert, slot)
        table.finish_load(slot)
    assert table.ready() == [(0, B), (1, ExpertId(0, 0)), (3, A)]
    table.evict(3)
    table.evict(0)
    assert table.empty_slots() == [0, 2, 3]


def test_the_list_of_empty_slots_is_the_callers_own() -> None:
    table = SlotTable(LAYERS, EXPERTS, SLOTS)
    table.empty_slots().clear()
    assert table.empty_slots() == list(range(SLOTS))
    table.begin_load(A, 0)
    table.check_integrity()


def test_the_table_of_slots_is_int32_and_live() -> None:
    table = SlotTable(LAYERS, EXPERTS, SLOTS)
    row_E = table.ready_LE[1]
    table.begin_load(B, 1)
    table.finish_load(1)
    assert row_E.dtype == np.int32 and row_E.tolist() == [-1, -1, 1]
    assert np.shares_memory(row_E, table.ready_LE[1])


def test_every_hold_has_to_be_taken_back_before_eviction() -> None:
    table = table_with(ready=1)
    table.hold(1)
    table.hold(1)
    table.unhold(1)
    assert table.holds(1) == 1
    with pytest.raises(IntegrityError, match=r"evict of slot 1 \(READY, expert 1/2, 1 holds\)"):
        table.evict(1)
    assert table.is_ready(B)
    table.unhold(1)
    table.evict(1)
    table.check_integrity()


ILLEGAL: dict[str, tuple[Callable[[SlotTable], object], str]] = {
    "load into a loading slot": (lambda t: t.begin_load(ExpertId(0, 0), 0), r"slot 0 \(LOADING, expert 0/1"),
    "load into a ready slot": (lambda t: t.begin_load(ExpertId(0, 0), 1), r"slot 1 \(READY, expert 1/2"),
    "load a loading expert": (lambda t: t.begin_load(A, 2), r"expert 0/1 into slot 2.*slot 0 \(LOADING"),
    "load a ready expert": (lambda t: t.begin_load(B, 2), r"expert 1/2 into slot 2.*slot 1 \(READY"),
    "load an unknown layer": (lambda t: t.begin_load(ExpertId(2, 0), 2), "expert 2/0"),
    "load an unknown expert": (lambda t: t.begin_load(ExpertId(0, -1), 2), "expert 0/-1"),
    "finish an empty slot": (lambda t: t.finish_load(2), r"finish_load of slot 2 \(EMPTY.*must be LOADING"),
    "finish a ready slot": (lambda t: t.finish_load(1), r"slot 1 \(READY"),
    "abort an empty slot": (lambda t: t.abort_load(2), r"slot 2 \(EMPTY"),
    "abort a ready slot": (lambda t: t.abort_load(1), r"slot 1 \(READY"),
    "evict an empty slot": (lambda t: t.evict(2), r"slot 2 \(EMPTY"),
    "evict a loading slot": (lambda t: t.evict(0), r"slot 0 \(LOADING"),
    "hold an empty slot": (lambda t: t.hold(2), r"slot 2 \(EMPTY"),
    "hold a loading slot": (lambda t: t.hold(0), r"slot 0 \(LOADING"),
    "unhold a slot that is not held": (lambda t: t.unhold(1), r"unhold of slot 1 .*not held"),
    "a slot past the end": (lambda t: t.begin_load(ExpertId(0, 0), SLOTS), "slot 4 is not one of the 4 slots"),
    "a negative slot": (lambda t: t.finish_load(-SLOTS), "slot -4"),
    "the state of no slot": (lambda t: t.state(-1), "slot -1"),
    "the expert of no slot": (lambda t: t.expert_in(-1), "slot -1"),
    "the holds of no slot": (lambda t: t.holds(SLOTS), "slot 4"),
    "unhold of no slot": (lambda t: t.unhold(-1), "slot -1"),
}


@pytest.mark.parametrize(("action", "message"), ILLEGAL.values(), ids=ILLEGAL)
def test_illegal_transitions_raise_and_change_nothing(action: Callable[[SlotTable], object], message: str) -> None:
    table = table_with(loading=0, ready=1)
    with pytest.raises(IntegrityError, match=message):
        action(table)
    table.check_integrity()
    assert table.slot_of(A) == 0 and table.ready() == [(1, B)] and table.empty_slots() == [2, 3]
    assert [table.holds(slot) for slot in range(SLOTS)] == [0] * SLOTS


def forget_the_expert(table: SlotTable) -> None:
    del table.slots[B.layer][B.expert]


def forget_the_slot(table: SlotTable) -> None:
    table._experts[1] = None


def mislead_the_kernels(table: SlotTable) -> None:
    table._ready_LE[0, 0] = 1


def hide_from_the_kernels(table: SlotTable) -> None:
    table._ready_LE[1, 2] = -1


def hold_while_loading(table: SlotTable) -> None:
    table._holds[0] = 1


def hold_less_than_nothing(table: SlotTable) -> None:
    table._holds[1] = -1


def lose_an_empty_slot(table: SlotTable) -> None:
    table._empty.remove(3)


def empty_without_leaving(table: SlotTable) -> None:
    table._states[1] = SlotState.EMPTY


@pytest.mark.parametrize(
    "damage",
    [
        forget_the_expert,
        forget_the_slot,
        mislead_the_kernels,
        hide_from_the_kernels,
        hold_while_loading,
        hold_less_than_nothing,
        lose_an_empty_slot,
        empty_without_leaving,
    ],
)
def test_check_integrity_sees_damage(damage: Callable[[SlotTable], None]) -> None:
    table = table_with(loading=0, ready=1)
    table.check_integrity()
    damage(table)
    with pytest.raises(IntegrityError):
        table.check_integrity()


class TableAgainstModel(RuleBasedStateMachine):
    """A SlotTable does what a plain dict of slots does: legal steps change both, illegal ones raise and change none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(LAYERS, EXPERTS, SLOTS)
        self.model: dict[int, tuple[ExpertId, SlotState, int]] = {}  # slot -> expert, state, holds

    def attempt(self, legal: bool, action: Callable[[], None], after: tuple[ExpertId, SlotState, int] | None) -> None:
        """Runs ``action`` on ``self.slot``; ``after`` is what the model then has there (None: nothing)."""
        if not legal:
            with pytest.raises(IntegrityError):
                action()
            return
        action()
        self.model.pop(self.slot, None)
        if after is not None:
            self.model[self.slot] = after

    def look(self, slot: int) -> tuple[ExpertId | None, SlotState, int]:
        self.slot = slot
        return self.model.get(slot, (None, SlotState.EMPTY, 0))

    @rule(slot=st.integers(-1, SLOTS), layer=st.integers(0, LAYERS), expert=st.integers(0, EXPERTS - 1))
    def begin_load(self, slot: int, layer: int, expert: int) -> None:
        wanted = ExpertId(layer, expert)
        _, state, _ = self.look(slot)
        known = any(wanted == there for there, _, _ in self.model.values())
        legal = 0 <= slot < SLOTS and layer < LAYERS and state is SlotState.EMPTY and not known
        self.attempt(legal, lambda: self.table.begin_load(wanted, slot), (wanted, SlotState.LOADING, 0))

    @rule(slot=st.integers(0, SLOTS - 1))
    def finish_load(self, slot: int) -> None:
        expert, state, _ = self.look(slot)
        after = None if expert is None else (expert, SlotState.READY, 0)
        self.attempt(state is SlotState.LOADING, lambda: self.table.finish_load(slot), after)

    @rule(slot=st.integers(0, SLOTS - 1))
    def abort_load(self, slot: int) -> None:
        _, state, _ = self.look(slot)
        self.attempt(state is SlotState.LOADING, lambda: self.table.abort_load(slot), None)

    @rule(slot=st.integers(0, SLOTS - 1))
    def evict(self, slot: int) -> None:
        _, state, holds = self.look(slot)
        self.attempt(state is SlotState.READY and holds == 0, lambda: self.table.evict(slot), None)

    @rule(slot=st.integers(0, SLOTS - 1))
    def hold(self, slot: int) -> None:
        expert, state, holds = self.look(slot)
        after = None if expert is None else (expert, state, holds + 1)
        self.attempt(state is SlotState.READY, lambda: self.table.hold(slot), after)

    @rule(slot=st.integers(0, SLOTS - 1))
    def unhold(self, slot: int) -> None:
        expert, state, holds = self.look(slot)
        after = None if expert is None else (expert, state, holds - 1)
        self.attempt(holds > 0, lambda: self.table.unhold(slot), after)

    @invariant()
    def agrees(self) -> None:
        self.table.check_integrity()
        for slot in range(SLOTS):
            expert, state, holds = self.model.get(slot, (None, SlotState.EMPTY, 0))
            assert (self.table.expert_in(slot), self.table.state(slot), self.table.holds(slot)) == (
                expert,
                state,
                holds,
            )
        where = {expert: slot for slot, (expert, _, _) in self.model.items()}
        ready = {slot: expert for slot, (expert, state, _) in self.model.items() if state is SlotState.READY}
        for layer in range(LAYERS):
            for e in range(EXPERTS):
                expert = ExpertId(layer, e)
                assert self.table.slot_of(expert) == where.get(expert, -1)
                assert self.table.is_ready(expert) == (expert in ready.values())
                assert int(self.table.ready_LE[layer, e]) == (where[expert] if expert in ready.values() else -1)
        assert self.table.ready() == sorted(ready.items())
        assert self.table.empty_slots() == [slot for slot in range(SLOTS) if slot not in self.model]


TableAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTableAgainstModel = TableAgainstModel.TestCase


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_poisoned_pool_is_nan_until_written_and_again_after_scrub(dtype: torch.dtype) -> None:
    pool = SlotPool(3, ExpertLayout(dtype, hidden=64, intermediate=32), poison=True)
    assert pool.weights.w13_SNH.isnan().all() and pool.weights.w2_SHI.isnan().all()
    pool.rows_SB.zero_()
    pool.scrub(1)
    for values in (pool.weights.w13_SNH, pool.weights.w2_SHI):
        assert values[1].isnan().all() and not values[0].any() and not values[2].any()


def test_scrub_does_nothing_without_poison() -> None:
    pool = SlotPool(2, SMALL)
    pool.row(1).fill_(7)
    pool.scrub(1)
    assert (pool.row(1) == 7).all() and not pool.row(0).any()


def test_rows_are_views_on_pages_that_the_weights_share() -> None:
    pool = SlotPool(3, SMALL)
    assert pool.num_slots == 3 and pool.rows_SB.shape == (3, SMALL.slot_bytes)
    assert all(pool.row(slot).data_ptr() % 4096 == 0 for slot in range(3))
    pool.row(2).fill_(1)
    assert pool.weights.w13_SNH[2].all() and not pool.weights.w13_SNH[1].any()
