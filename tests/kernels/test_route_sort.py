"""The routing plan: its definition by hand, and the Triton kernels equal to the twin in every element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import DeviceWork, HostWork, RoutePlan, by_demand, reference, route_sort
from tests.kernels.common import DEVICE


@st.composite
def routings(draw: st.DrawFn, max_tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Routed ids [T, K], distinct in a row but for padding and repeated tokens, and a row of the slot table [E]."""
    experts = draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 60, 64, 128]))
    top_k = draw(st.integers(1, min(experts, 8)))
    tokens = draw(st.integers(1, max_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scores = torch.rand(tokens, experts, generator=generator)
    skew = draw(st.sampled_from(["even", "hot", "few", "repeated"]))
    if skew == "hot":
        scores[:, draw(st.integers(0, experts - 1))] = 2.0
    elif skew == "few":
        scores[:, :top_k] += 1.0
    elif skew == "repeated":
        scores = scores[:1].expand(tokens, -1)
    ids = scores.argsort(dim=1, descending=True)[:, :top_k].contiguous()
    if draw(st.booleans()):
        ids[torch.rand(tokens, generator=generator) < 0.3] = draw(st.sampled_from([-1, experts, 99999]))
    slots = torch.randperm(experts + 5, generator=generator)[:experts].int()
    slots[torch.rand(experts, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = -1
    return ids.to(draw(st.sampled_from([torch.int32, torch.int64]))), slots


def assert_same_plan(ours: RoutePlan, theirs: RoutePlan) -> None:
    assert ours.top_k == theirs.top_k
    for name in ("order_R", "starts_E1"):
        assert getattr(ours, name).dtype == torch.int32
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), name
    for mine, other in ((ours.resident, theirs.resident), (ours.missing, theirs.missing)):
        for name in ("experts_W", "slots_W", "count_1"):
            assert getattr(mine, name).dtype == getattr(other, name).dtype == torch.int32
            assert torch.equal(getattr(mine, name).cpu(), getattr(other, name)), name


@given(routing=routings())
@settings(max_examples=100, deadline=None)
def test_the_twin_is_the_definition(routing: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, slots = routing
    plan = reference.route_plan(ids, slots)
    flat = [e if 0 <= e < len(slots) else len(slots) for e in ids.flatten().tolist()]
    assert plan.order_R.tolist() == sorted(range(len(flat)), key=lambda n: (flat[n], n))
    assert plan.starts == [sum(e < expert for e in flat) for expert in range(len(slots) + 1)]
    for expert in range(len(slots)):
        start, stop = plan.rows(expert)
        assert all(flat[n] == expert for n in plan.order_R[start:stop].tolist())
        assert stop - start == flat.count(expert)
    wanted = sorted(set(flat) - {len(slots)})
    assert plan.resident.pairs() == [(e, int(slots[e])) for e in wanted if slots[e] >= 0]
    assert plan.missing.pairs() == [(e, -1) for e in wanted if slots[e] < 0]
    demand = by_demand(plan.num_rows())
    assert sorted(demand) == wanted
    assert demand == sorted(wanted, key=lambda e: (-flat.count(e), e))


@given(routing=routings())
@settings(max_examples=60, deadline=None)
def test_one_launch_equals_the_twin(routing: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, slots = routing
    assert_same_plan(route_sort.route_plan(ids.to(DEVICE), slots.to(DEVICE)), reference.route_plan(ids, slots))


@given(routing=routings(max_tokens=300))
@settings(max_examples=15, deadline=None)
def test_blocks_equal_the_twin(routing: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, slots = routing
    order, starts = slots.new_empty(ids.numel()).to(DEVICE), slots.new_empty(len(slots) + 1).to(DEVICE)
    lists = slots.new_empty(2, 3, len(slots)).to(DEVICE)
    route_sort._plan_large(ids.to(DEVICE), slots.to(DEVICE), order, starts, lists)
    resident, missing = (DeviceWork(row[0], row[1], row[2, :1]) for row in lists)
    assert_same_plan(RoutePlan(order, starts, resident, missing, ids.shape[1]), reference.route_plan(ids, slots))


def test_a_long_prompt_takes_the_blocks() -> None:
    ids = torch.rand(90, 32).argsort(dim=1)[:, :8].contiguous()
    slots = torch.arange(32, dtype=torch.int32)
    assert ids.numel() > route_sort.SMALL_ROWS
    assert_same_plan(route_sort.route_plan(ids.to(DEVICE), slots.to(DEVICE)), reference.route_plan(ids, slots))


def test_work_of_pairs_ascends() -> None:
    work = HostWork.of([(7, 1), (2, 9)])
    assert work.pairs() == [(2, 9), (7, 1)]
    assert HostWork.of([]).pairs() == []


def test_a_list_goes_to_a_gpu_from_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.tensor

    class Pinned(torch.Tensor):
        def to(self, device: str, *, non_blocking: bool = False) -> torch.Tensor:
            assert (device, non_blocking) == ("cuda", True)
            return self.as_subclass(torch.Tensor)

    def tensor(numbers: list[int], *, dtype: torch.dtype, device: str, pin_memory: bool) -> torch.Tensor:
        assert pin_memory and device == "cpu"
        return made(numbers, dtype=dtype).as_subclass(Pinned)

    monkeypatch.setattr(torch, "tensor", tensor)
    work = HostWork.of([(7, 1), (2, 9)], "cuda")
    assert [part.tolist() for part in (work.experts_W, work.slots_W, work.count_1)] == [[2, 7], [9, 1], [2]]


@pytest.mark.parametrize(
    ("ids", "slots", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), "topk_ids_TK is torch.float32"),
        (torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), "shape"),
        (torch.zeros(2, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int64), "slots_E is torch.int64"),
        (torch.zeros(2, 4, dtype=torch.int32)[:, ::2], torch.zeros(4, dtype=torch.int32), "contiguous"),
        (torch.zeros(0, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), "empty"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32), "1023"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32, device="meta"), "one device"),
    ],
)
def test_wrong_operands_are_refused(ids: torch.Tensor, slots: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        route_sort.route_plan(ids, slots)
