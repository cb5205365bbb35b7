"""Whole decode steps as one recording: the bits of the model itself, and books that agree with what the device did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool, SlotState
from duoserve.experts.streams import Lane
from duoserve.kv_cache import NewTokens
from duoserve.launching.graph import graph_steps
from duoserve.launching.launch import StepParts
from duoserve.launching.recorded import RecordedRunner
from duoserve.passes import StepRunner
from duoserve.scheduling.read_through import ReadThrough
from duoserve.scheduling.scheduler import Scheduler
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import BARD
from tests.helpers.fake_streams import FakeMark
from tests.helpers.lagging import LaggingDevice, Truth, write
from tests.launching.conftest import DTYPES, MAX_TOKENS, PROMPTS
from tests.scheduling.fortune import GUESSING, any_teller

EXPERTS = [ExpertId(layer, expert) for layer in range(3) for expert in range(8)]


class Checked:
    """Makes a runner whose every step is followed by a look at the books and at the bytes in the slots."""

    def __init__(self, device: LaggingDevice, record_after: int = 0) -> None:
        self.device = device
        self.record_after = record_after
        self.pool: SlotPool | None = None
        self.steps = 0

    def make_pool(self, num_slots: int, layout: object) -> SlotPool:
        self.pool = self.device.pool(num_slots, layout)
        return self.pool

    def runner(self, parts: StepParts) -> StepRunner:
        steps = graph_steps(
            parts.model, parts.cache, self.device.recorder, self.device.store, parts.scheduler.read_through()
        )
        lagging = self.device.lagging(RecordedRunner(parts.model, parts.cache, steps, self.record_after))

        def step(new_tokens: NewTokens) -> Tensor:
            logits_BV = lagging(new_tokens)
            self.look(parts.scheduler)
            return logits_BV

        return step

    def look(self, scheduler: Scheduler) -> None:
        """Every READY slot has its expert's bytes, and nobody holds anything."""
        table = scheduler.table
        table.check_integrity()
        self.steps += 1
        assert self.pool is not None
        slots = self.pool.weights
        for slot in range(table.num_slots):
            assert table.holds(slot) == 0
            expert = table.expert_in(slot)
            if table.state(slot) is SlotState.READY and expert is not None:
                row_B = self.device.store.host_row(expert)
                assert row_B is not None
                row = self.device.store.layout.weights(row_B[None])
                assert torch.equal(slots.w13_SNH[slot], row.w13_SNH[0]) and torch.equal(
                    slots.w2_SHI[slot], row.w2_SHI[0]
                )


@given(
    dtype=st.sampled_from(DTYPES),
    policy=st.sampled_from(["lru", *GUESSING]),
    slots=st.integers(3, 24),
    record_after=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=32, deadline=None)
def test_the_bits_of_the_model_itself(
    dtype: str, policy: str, slots: int, record_after: int, seed: int, models: dict[str, tuple[Path, Truth]]
) -> None:
    """Steps that find no room for their misses go another way; prefills and such steps come in between.

    What is predicted is of no consequence: where a policy listens to a predictor, that one lies, or says anything.
    """
    folder, truth = models[dtype]
    device = LaggingDevice(seed, EXPERTS)
    checked = Checked(device, record_after)
    teller = any_teller("liar" if seed % 2 else "anything", seed, 1 + seed % 3) if policy in GUESSING else None
    with assembled(
        folder,
        policy,
        slots,
        device.copies,
        predictor=teller,
        make_pool=checked.make_pool,
        make_step_runner=checked.runner,
    ) as engine:
        for _ in range(2):
            assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
    assert truth.differences(device.logits, rounds=2) == []
    assert checked.steps == 2 * len(truth.logits)
    assert device.recorder.num_recordings == sum(min(8, 2 * sequences) <= slots for sequences in (1, 2, 3))


FILLS = {"moe_up_fill", "moe_down_fill"}


@pytest.mark.parametrize(("policy", "filling"), [("resident", set()), ("lru", FILLS)])
def test_a_step_fills_slots_only_where_an_expert_can_be_missing(
    policy: str, filling: set[str], folder: Path, truth: Truth
) -> None:
    """By the policy, not by the slots: any other fills slots for all experts step by step."""
    device = LaggingDevice(seed=5, in_ram=EXPERTS)

    with assembled(
        folder, policy, 24, device.copies, make_pool=device.pool, make_step_runner=device.recorded("graph")
    ) as engine:
        assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
    assert truth.differences(device.logits) == []
    assert device.recorder.launched & FILLS == filling and "moe_experts" in device.recorder.launched


@pytest.mark.parametrize("kind", ["liar", "anything"])
def test_what_is_copied_between_two_steps_changes_no_bit(kind: str, folder: Path, truth: Truth) -> None:
    device = LaggingDevice(seed=2, in_ram=EXPERTS)
    checked, teller = Checked(device), any_teller(kind, 3, 2)
    with assembled(
        folder,
        "lookahead",
        12,
        device.copies,
        predictor=teller,
        make_pool=checked.make_pool,
        make_step_runner=checked.runner,
    ) as engine:
        assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
        copied = engine.meter.snapshot().bytes
    assert truth.differences(device.logits) == []
    assert copied.prefetched_useful + copied.wasted > 0


def test_bard_in_a_quarter_of_its_slots() -> None:
    device = LaggingDevice(seed=1, in_ram=[ExpertId(layer, expert) for layer in range(6) for expert in range(8)])
    checked = Checked(device)
    with assembled(
        BARD, "lru", 12, device.copies, make_pool=checked.make_pool, make_step_runner=checked.runner
    ) as engine:
        tokens = write(engine, PROMPTS, MAX_TOKENS)
        stats = engine.meter.snapshot()
    truth = Truth(BARD, 48, PROMPTS, MAX_TOKENS)
    assert tokens == truth.tokens and truth.differences(device.logits) == []
    assert stats.hits["decode"] > 0 and stats.misses["decode"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_step_that_is_cut_short_leaves_the_device_nothing_to_do(
    seed: int, folder: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C: else it would fill slots later on that the next prompt has brought its own experts into."""
    device, launched = LaggingDevice(seed, EXPERTS), list[FakeMark]()
    catch_up = ReadThrough.catch_up

    def interrupted(books: ReadThrough) -> None:
        if not (launched or device.streams.host_computes):  # the first time that a step runs meanwhile
            launched.append(device.streams.mark(Lane.COMPUTE))
            raise KeyboardInterrupt
        catch_up(books)

    def runner(parts: StepParts) -> StepRunner:
        books = parts.scheduler.read_through()
        steps = graph_steps(parts.model, parts.cache, device.recorder, device.store, books)
        decode = RecordedRunner(parts.model, parts.cache, steps, 0)

        def step(new_tokens: NewTokens) -> Tensor:
            try:
                logits_BV = decode(new_tokens)
                device.streams.finish()
                return logits_BV
            finally:
                device.streams.host_computes = True

        return step

    monkeypatch.setattr(ReadThrough, "catch_up", interrupted)
    with assembled(folder, "lru", 12, device.copies, make_pool=device.pool, make_step_runner=runner) as engine:
        with pytest.raises(KeyboardInterrupt):
            write(engine, PROMPTS, MAX_TOKENS)
        done = launched[0].passed_at is not None
        assert write(engine, PROMPTS, MAX_TOKENS) == truth.tokens
    assert done
