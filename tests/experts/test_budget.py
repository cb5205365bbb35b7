"""The memory plan: its arithmetic, its caps, and refusals whose figures work when they are given back."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.config import EngineConfig
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.budget import Footprint, FreeMemory, MemoryPlan, plan_memory, slot_count
from duoserve.experts.layout import ExpertLayout

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One call of ``plan_memory``, with bard-like defaults: 48 experts of 393216 bytes."""

    hidden: int = 256
    num_layers: int = 6
    num_experts: int = 8
    top_k: int = 2
    dense: int = 3_000_000
    kv: int = 500_000
    workspace: int = 1_000_000
    available: int = GIB
    needs_all: bool = False
    keeps: bool = True

    @property
    def total(self) -> int:
        return self.num_layers * self.num_experts

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(torch.bfloat16, self.hidden, 256)

    def plan(self, wanted: EngineConfig, host_available: int | None = None) -> MemoryPlan:
        model = Footprint(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            slot_bytes=self.layout.slot_bytes,
            dense_bytes=self.dense,
            kv_bytes=self.kv,
            workspace_bytes=self.workspace,
        )
        free = FreeMemory(self.available, host_available)
        return plan_memory(model, wanted, free, needs_all=self.needs_all, keeps=self.keeps)


BARD = Case()
ROW = BARD.layout.slot_bytes
FIXED = BARD.dense + BARD.kv + BARD.workspace


@pytest.mark.parametrize(
    ("slots", "count"), [("25%", 12), ("100 %", 48), ("12.5%", 6), ("1%", 0), (7, 7), (np.int64(7), 7)]
)
def test_slot_count(slots, count):
    found = slot_count(slots, 48)
    assert found == count and type(found) is int


@pytest.mark.parametrize("nonsense", ["0%", "101%", "%", "-5%", "7", "nan%", 2.5, True])
def test_slot_count_refuses_nonsense(nonsense):
    with pytest.raises(ConfigError, match="a share of all experts such as '25%'"):
        slot_count(nonsense, 48)


@pytest.mark.parametrize(
    ("wanted", "slots"),
    [
        (EngineConfig(expert_slots=7), 7),
        (EngineConfig(expert_slots="25%"), 12),
        (EngineConfig(expert_slots=10_000), 48),
        (EngineConfig(expert_memory=7 * ROW + ROW - 1), 7),
        (EngineConfig(expert_memory=GIB), 48),
        (EngineConfig(memory=FIXED + 5 * ROW), 5),
        (EngineConfig(memory=100 * GIB), 48),
        (EngineConfig(), 48),
    ],
)
def test_each_knob_gives_its_slots(wanted, slots):
    plan = BARD.plan(wanted)
    assert plan.num_slots == slots
    assert plan.total_bytes == slots * ROW + FIXED


def test_without_a_knob_a_fifth_of_the_free_ram_is_left():
    available = 2 * (FIXED + 4 * ROW)
    for host_memory in (None, ROW):
        plan = replace(BARD, available=available).plan(EngineConfig(host_memory=host_memory))
        used = plan.total_bytes + plan.host_bytes
        assert used <= 0.8 * available < used + ROW


@pytest.mark.parametrize(("host_memory", "rows"), [(None, 0), (ROW - 1, 0), (5 * ROW + 1, 5), (GIB, 48)])
def test_host_memory_holds_whole_rows_and_no_more_than_there_are(host_memory, rows):
    plan = BARD.plan(EngineConfig(expert_slots=12, host_memory=host_memory))
    assert (plan.host_experts, plan.host_bytes) == (rows, rows * ROW)


def test_no_rows_wait_when_every_expert_has_a_slot():
    plan = BARD.plan(EngineConfig(host_memory=GIB))
    assert plan.host_experts == 0 and plan.read_once
    assert not BARD.plan(EngineConfig(expert_slots=47, host_memory=0)).read_once


def test_rows_wait_behind_slots_that_keep_none():
    none_kept = replace(BARD, keeps=False)
    assert none_kept.plan(EngineConfig(host_memory=5 * ROW)).host_experts == 5
    nowhere_else = none_kept.plan(EngineConfig(host_memory=0))
    assert nowhere_else.all_in_slots and nowhere_else.host_experts == 0 and not nowhere_else.read_once
    assert none_kept.plan(EngineConfig(host_memory=GIB)).host_experts == 48
    roomy = replace(none_kept, available=2 * (FIXED + 48 * ROW))
    both = roomy.plan(EngineConfig(host_memory=GIB))
    assert both.host_experts == 48 and both.num_slots < 48
    assert both.total_bytes + both.host_bytes <= 0.8 * roomy.available


def test_host_rows_and_slots_share_the_ram():
    room = replace(BARD, available=FIXED + 20 * ROW)
    assert room.plan(EngineConfig(expert_slots=12, host_memory=8 * ROW)).host_experts == 8
    with pytest.raises(MemoryBudgetError, match="lower expert_slots to at most 11"):
        room.plan(EngineConfig(expert_slots=12, host_memory=9 * ROW))


def test_a_resident_policy_needs_a_slot_for_every_expert():
    every = replace(BARD, needs_all=True)
    assert every.plan(EngineConfig()).num_slots == 48
    with pytest.raises(
        MemoryBudgetError, match=r"47 of the 48 slots that are needed \(6 layers x 8 experts, all resident\)"
    ):
        every.plan(EngineConfig(expert_slots=47))


def test_refusal_shows_the_arithmetic():
    with pytest.raises(MemoryBudgetError) as caught:
        BARD.plan(EngineConfig(memory=5_000_000))
    for part in ("memory=5000000 bytes (4.77 MiB) gives 1 of the 3", "slots that are needed (top-2 and one prefetch)",
                 "3 slots x 393216 bytes (384.00 KiB)", "dense weights 3000000 bytes", "KV cache 500000 bytes",
                 "workspace 1000000 bytes", "raise memory to at least 5679648 bytes"):  # fmt: skip
        assert part in str(caught.value)


def test_as_text_it_adds_up():
    lines = str(BARD.plan(EngineConfig(expert_slots=12, host_memory=5 * ROW))).splitlines()
    squeezed = [" ".join(line.split()) for line in lines]
    assert squeezed[0] == "expert slots 4.50 MiB (12 slots x 393216 B, 25.0% of 48 experts)"
    assert squeezed[4] == "total 8.79 MiB"
    assert squeezed[5] == "in host RAM 1.88 MiB (5 experts x 393216 B)"


SIZES = st.integers(0, 20_000_000)
CASES = st.builds(
    Case,
    hidden=st.sampled_from([64, 256, 300]),
    num_layers=st.integers(1, 6),
    num_experts=st.integers(2, 8),
    top_k=st.integers(1, 2),
    dense=SIZES,
    kv=SIZES,
    workspace=SIZES,
    available=st.integers(0, 90_000_000),
    needs_all=st.booleans(),
    keeps=st.booleans(),
)
KNOBS = st.one_of(
    st.just({}),
    st.builds(lambda n: {"expert_slots": n}, st.integers(-1, 60)),
    st.builds(lambda n: {"expert_memory": n}, SIZES),
    st.builds(lambda n: {"memory": n}, st.integers(0, 90_000_000)),
)
HOST = st.none() | SIZES
RAM_FLOOR = re.compile(r"at least (\d+) bytes of RAM must be free")
REMEDY = re.compile(r"(raise|lower|set) (expert_slots|expert_memory|memory) to at (?:least|most) (\d+)")


def refusal(case: Case, knobs: dict[str, int], host_memory: int | None) -> str | None:
    """The message, or None for a plan, whose promises are checked."""
    try:
        plan = case.plan(EngineConfig(**knobs, host_memory=host_memory))
    except MemoryBudgetError as error:
        return str(error)
    assert min(case.top_k + 1, case.total) <= plan.num_slots <= case.total
    assert plan.total_bytes + plan.host_bytes <= case.available
    assert plan.total_bytes <= knobs.get("memory", case.available)
    assert plan.num_slots * plan.slot_bytes <= knobs.get("expert_memory", case.available)
    return None


@settings(max_examples=400, deadline=None)
@given(CASES, KNOBS, HOST)
def test_following_the_advice_succeeds_and_its_figure_is_exact(case, knobs, host_memory):
    message = refusal(case, knobs, host_memory)
    if message and (floor := RAM_FLOOR.search(message)):
        assert case.available < int(floor[1])
        case = replace(case, available=int(floor[1]))
        message = refusal(case, knobs, host_memory)
        assert not (message and RAM_FLOOR.search(message))
    if message is None:
        return
    verb, knob, figure = REMEDY.search(message).groups()
    assert refusal(case, {knob: int(figure)}, host_memory) is None
    step = 1 if knob == "expert_slots" or verb != "lower" else case.layout.slot_bytes
    beyond = int(figure) + (step if verb == "lower" else -step)
    assert refusal(case, {knob: beyond}, host_memory) is not None


@pytest.mark.parametrize("name", ["expert_memory", "memory", "host_memory"])
@pytest.mark.parametrize("size", [-1, "4GiB", 1.5, True])
def test_sizes_are_bytes(name, size):
    with pytest.raises(ConfigError, match=f"{name} is {size!r}, but must be an integer of at least 0"):
        EngineConfig(**{name: size})


def test_a_refusal_adds_up_where_waiting_experts_lie_in_another_memory():
    case, wanted = replace(BARD, available=FIXED), EngineConfig(host_memory=5 * ROW)
    with pytest.raises(MemoryBudgetError) as on_cpu:
        case.plan(wanted)
    assert "5 experts in host RAM" in str(on_cpu.value)
    with pytest.raises(MemoryBudgetError) as on_gpu:
        case.plan(wanted, host_available=GIB)
    assert f"at least {FIXED + 3 * ROW} bytes of GPU memory" in str(on_gpu.value)
    assert "host RAM" not in str(on_gpu.value)
