"""Recorded decode steps through whole models: the bits of the model itself, on a device that lags behind the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve import SamplingParams
from duoserve.config import Phase
from duoserve.errors import CopyError
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.store import ExpertStore, HostStore
from duoserve.experts.stream_engine import StreamCopyEngine
from duoserve.experts.tickets import Ticket
from duoserve.launching.event import event_steps
from duoserve.launching.launch import StepParts
from duoserve.launching.recorded import MAX_SEQUENCES, MAX_SHAPES, RecordedRunner
from duoserve.loading.workspace import recorded_bytes
from duoserve.models.mixtral import parse_config
from duoserve.passes import DecodeStep, StepRunner
from duoserve.request import Request
from duoserve.scheduling.lease import SlotLease
from duoserve.scheduling.routing import Routing
from duoserve.scheduling.source import ReadyExpert
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import BARD
from tests.helpers.lagging import LaggingDevice, Truth, write
from tests.helpers.listeners import Heard
from tests.launching.conftest import DTYPES, MAX_TOKENS, PROMPTS
from tests.scheduling.fortune import GUESSING, STREAMING, any_teller

CACHE = SimpleNamespace(batch=lambda layout: layout, num_pages=1)
EXPERTS = [ExpertId(layer, expert) for layer in range(3) for expert in range(8)]


def _runner(parts: StepParts, device: LaggingDevice, **options: int) -> RecordedRunner:
    steps = event_steps(parts.model, parts.cache, device.recorder)
    return RecordedRunner(parts.model, parts.cache, steps, **options)


def recorded(device: LaggingDevice, record_after: int = 0) -> Callable[[StepParts], StepRunner]:
    return lambda parts: device.lagging(_runner(parts, device, record_after=record_after))


@given(
    dtype=st.sampled_from(DTYPES),
    policy=st.sampled_from(STREAMING),
    slots=st.integers(3, 24),
    in_ram=st.integers(0, 24),
    record_after=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=32, deadline=None)
def test_the_bits_of_the_model_itself(
    dtype: str,
    policy: str,
    slots: int,
    in_ram: int,
    record_after: int,
    seed: int,
    models: dict[str, tuple[Path, Truth]],
) -> None:
    """Three sequences, of which two end early: shapes come and go, experts too, and free slots are NaN.

    What is predicted is of no consequence: where a policy listens to a predictor, that one lies, or says anything.
    """
    experts = [ExpertId(layer, expert) for layer in range(3) for expert in range(8)][:in_ram]
    folder, truth = models[dtype]
    device = LaggingDevice(seed, experts)
    teller = any_teller("liar" if seed % 2 else "anything", seed, 1 + seed % 3) if policy in GUESSING else None
    make_step_runner = recorded(device, record_after)
    with assembled(
        folder, policy, slots, device.copies, predictor=teller, make_pool=device.pool, make_step_runner=make_step_runner
    ) as engine:
        for _ in range(2):
            assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
    assert truth.differences(device.logits, rounds=2) == []
    assert device.recorder.num_recordings == 3 * (3 + 3 + 1)  # shapes x (parts of 3 layers, their experts, the head)


def test_bard_in_a_quarter_of_its_slots() -> None:
    device = LaggingDevice(seed=1)
    with assembled(BARD, "lru", 12, device.copies, make_pool=device.pool, make_step_runner=recorded(device)) as engine:
        tokens = write(engine, PROMPTS, MAX_TOKENS)
    truth = Truth(BARD, 48, PROMPTS, MAX_TOKENS)
    assert tokens == truth.tokens and truth.differences(device.logits) == []


class Witness(Heard):
    """Looks, whenever a decode step's layer is told, whether all it wants is in a slot or on its way by then.

    ``course`` has how many experts were launched at once, and "told", in the order of these events.
    """

    def __init__(self) -> None:
        super().__init__(lookahead=1)
        self.parts: StepParts | None = None
        self.asked_for: list[bool] = []
        self.course: list[int | str] = []

    def routed(self, routing: Routing) -> None:
        if self.parts is not None and self.begun[-1][0] is Phase.DECODE:
            slots = self.parts.scheduler.table.slots[routing.layer]
            self.course.append("told")
            self.asked_for.append(set(routing.topk_ids_TK.ravel().tolist()) <= slots.keys())


def test_demands_are_on_their_way_and_hits_are_launched_before_anybody_hears_of_a_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, witness = LaggingDevice(seed=4), Witness()
    at_once = SlotLease.at_once

    def noted(lease: SlotLease) -> list[ReadyExpert]:
        ready = at_once(lease)
        witness.course.append(len(ready))
        return ready

    monkeypatch.setattr(SlotLease, "at_once", noted)

    def runner(parts: StepParts) -> StepRunner:
        witness.parts = parts
        return recorded(device)(parts)

    with assembled(folder, "lru", 9, device.copies, witness, make_pool=device.pool, make_step_runner=runner) as engine:
        write(engine, PROMPTS[:1], MAX_TOKENS[:1])
        stats = engine.meter.snapshot()
    assert stats.misses["decode"] > 0
    assert (
        witness.course[1::2] == ["told"] * len(witness.asked_for) and sum(witness.course[::2]) == stats.hits["decode"]
    )
    assert witness.asked_for == [True] * (3 * (MAX_TOKENS[0] - 1))


def test_only_so_many_shapes_are_recorded_at_a_time(folder: Path, truth: Truth) -> None:
    device, made = LaggingDevice(seed=2), []

    def runner(parts: StepParts) -> StepRunner:
        made.append(_runner(parts, device, record_after=0, max_shapes=2))
        return device.lagging(made[0])

    with assembled(folder, "lru", 6, device.copies, make_pool=device.pool, make_step_runner=runner) as engine:
        assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
    assert truth.differences(device.logits) == []
    assert device.recorder.num_recordings > 2 * (3 + 3 + 1)
    assert len(made[0]._steps) == 2


def test_the_shape_that_has_not_occurred_for_longest_makes_way() -> None:
    made: list[int] = []

    def make(num_sequences: int, table_width: int) -> DecodeStep:
        made.append(num_sequences)
        return lambda layout: torch.ones(1)

    runner = RecordedRunner(lambda batch: torch.zeros(1), CACHE, make, record_after=1, max_shapes=2)

    def recorded(num_sequences: int) -> bool:
        return bool(runner(SimpleNamespace(spans=[()] * num_sequences, page_table=[[0]])).item())

    assert [recorded(size) for size in (1, 1, 2, 2, 1)] == [False, True, False, True, True]
    assert [recorded(size) for size in (3, 3, 1)] == [False, True, True]
    assert [recorded(size) for size in (2, 2)] == [False, True]
    assert made == [1, 2, 3, 2]


def test_memory_is_planned_for_as_many_recordings_as_there_ever_are() -> None:
    alive: set[int] = set()
    most: list[int] = []

    def make(num_sequences: int, table_width: int) -> DecodeStep:
        def step(layout: object) -> Tensor:
            return torch.ones(1)

        alive.add(num_sequences)
        weakref.finalize(step, alive.remove, num_sequences)
        most.append(len(alive))
        return step

    runner = RecordedRunner(lambda batch: torch.zeros(1), CACHE, make, record_after=0)
    for num_sequences in range(1, 2 * MAX_SHAPES):
        assert runner(SimpleNamespace(spans=[()] * num_sequences, page_table=[[0]])).item() == 1
    assert len(alive) == MAX_SHAPES

    def planned(vocab_size: int) -> int:
        config = parse_config({"model_type": "mixtral", "dtype": "bfloat16", "vocab_size": vocab_size})
        return recorded_bytes(config, torch.bfloat16, 1)

    one_logit = torch.bfloat16.itemsize + torch.float32.itemsize
    assert max(most) * one_logit <= planned(1001) - planned(1000)


def test_shapes_that_cannot_be_recorded_do_not_count() -> None:
    made: list[int] = []

    def make(num_sequences: int, table_width: int) -> DecodeStep | None:
        made.append(num_sequences)
        return None if num_sequences > 1 else lambda layout: torch.ones(1)

    runner = RecordedRunner(lambda batch: torch.zeros(1), CACHE, make, record_after=0, max_shapes=1)
    layouts = [SimpleNamespace(spans=[()] * num_sequences, page_table=[[0]]) for num_sequences in (3, 2, 1, 2, 1)]
    assert [runner(layout).item() for layout in layouts] == [0, 0, 1, 0, 1] and made == [3, 2, 1]


def test_a_shape_that_memory_is_refused_for_is_tried_once_and_drops_no_other() -> None:
    made: list[int] = []

    def make(num_sequences: int, table_width: int) -> DecodeStep:
        made.append(num_sequences)
        if num_sequences > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return lambda layout: torch.ones(1)

    runner = RecordedRunner(lambda batch: torch.zeros(1), CACHE, make, record_after=1, max_shapes=1)
    layouts = [SimpleNamespace(spans=[()] * num_sequences, page_table=[[0]]) for num_sequences in (1, 1, 2, 2, 2, 2, 1)]
    with pytest.warns(UserWarning, match="out of memory while a decode step of 2 was recorded") as warned:
        assert [runner(layout).item() for layout in layouts] == [0, 1, 0, 0, 0, 0, 1]
    assert made == [1, 2] and len(warned) == 1


def test_what_else_goes_wrong_while_a_step_is_recorded_is_raised() -> None:
    def make(num_sequences: int, table_width: int) -> DecodeStep:
        raise RuntimeError("an illegal memory access was encountered")

    runner = RecordedRunner(lambda batch: torch.zeros(1), CACHE, make, record_after=0)
    with pytest.raises(RuntimeError, match="illegal"):
        runner(SimpleNamespace(spans=[()], page_table=[[0]]))


@pytest.mark.parametrize("mode", ["event", "graph"])
def test_requests_go_on_where_memory_for_recordings_is_refused(
    mode: str, folder: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = LaggingDevice(seed=6, in_ram=EXPERTS)

    def refuse(work: Callable[[], object]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(device.recorder, "record", refuse)
    runner = device.recorded(mode, record_after=1)
    with (
        pytest.warns(UserWarning, match="out of memory while a decode step"),
        assembled(folder, "lru", 12, device.copies, make_pool=device.pool, make_step_runner=runner) as engine,
    ):
        for _ in range(2):
            assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
    assert truth.differences(device.logits, rounds=2) == []


def test_more_sequences_than_the_memory_plan_counts_are_left_to_the_model_itself(folder: Path) -> None:
    device, steps = LaggingDevice(seed=5), list[DecodeStep | None]()

    def runner(parts: StepParts) -> StepRunner:
        make = event_steps(parts.model, parts.cache, device.recorder)
        steps.extend(make(num_sequences, 1) for num_sequences in (MAX_SEQUENCES, MAX_SEQUENCES + 1))
        return recorded(device)(parts)

    with assembled(folder, "lru", 6, device.copies, make_pool=device.pool, make_step_runner=runner):
        assert [step is None for step in steps] == [False, True]


def test_what_a_request_has_waited_for_is_in_its_own_figures(folder: Path) -> None:
    """The misses of its last layer too, behind which nothing else is asked for."""
    device, reported, engines = LaggingDevice(seed=4), [0, 0], list[StreamCopyEngine]()

    def report(which: int) -> None:
        reported[which] += 1

    def copies(store: ExpertStore, pool: SlotPool) -> StreamCopyEngine:
        heard = {"on_copied": lambda *_: report(0), "on_stalled": lambda *_: report(1)}
        engines.append(StreamCopyEngine(HostStore(store, EXPERTS), pool, device.streams, **heard))
        return engines[0]

    with assembled(folder, "on-demand", 6, copies, make_pool=device.pool, make_step_runner=recorded(device)) as engine:
        write(engine, PROMPTS[:1], [3])
        figures, before = engine.meter.snapshot(), list(reported)
        engines[0].settle()
        slot_bytes = engines[0]._slot_bytes
    assert before == reported and reported[1] > 0
    assert reported[0] * slot_bytes == figures.bytes.total


def test_a_failed_copy_ends_the_request_and_the_next_has_its_bits(folder: Path, truth: Truth) -> None:
    device = LaggingDevice(seed=3)

    class Failing(StreamCopyEngine):
        armed = False

        def wait(self, tickets: Collection[Ticket]) -> list[Ticket]:
            if Failing.armed:
                raise CopyError("injected")
            return super().wait(tickets)

        def settle(self) -> None:
            """No copy arrives unnoticed before it is waited for."""
            if not Failing.armed:
                super().settle()

    def copies(store: ExpertStore, pool: SlotPool) -> StreamCopyEngine:
        return Failing(store, pool, device.streams)

    with assembled(folder, "on-demand", 6, copies, make_pool=device.pool, make_step_runner=recorded(device)) as engine:
        request = Request(PROMPTS[1], SamplingParams(max_tokens=9, temperature=0.0))
        steps = engine.generate([request])
        next(steps), next(steps)
        Failing.armed = True
        with pytest.raises(CopyError, match="injected"):
            list(steps)
        Failing.armed = False
        assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
