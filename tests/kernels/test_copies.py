"""Whole experts copied into slots: every byte of theirs and no other, by the kernel and by the twin."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import DeviceWork, HostWork, Work, copies, moe_gemv, reference_copies
from duoserve.kernels.host_rows import HostRows
from tests.kernels.common import DEVICE, assert_same_bits, poisoned
from tests.kernels.experts_case import make_case
from tests.kernels.host_case import Away

GATHERS = (copies.page_gather, reference_copies.page_gather)
Gather = Callable[[HostRows, Work, torch.Tensor], None]


def random_rows(count: int, row_bytes: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.randint(0, 256, (count, row_bytes), generator=generator, dtype=torch.uint8)
    return rows.pin_memory() if DEVICE.type == "cuda" else rows


@given(
    experts=st.integers(1, 6),
    row_bytes=st.sampled_from([16, 4096, 16384, 16400, 36864]),
    away=st.sampled_from([0.0, 0.5, 1.0]),
    lost=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_rows_arrive_whole_and_alone(experts: int, row_bytes: int, away: float, lost: float, seed: int) -> None:
    """Rows of several chunks and of less than one; slots in any order, some of them canaries; some rows not there."""
    generator = torch.Generator().manual_seed(seed)
    rows_EB, before_SB = (random_rows(count, row_bytes, generator) for count in (experts, experts + 2))
    has_row = torch.rand(experts, generator=generator) >= lost
    source = HostRows.of([row_B if has else None for row_B, has in zip(rows_EB, has_row, strict=True)], DEVICE)
    slots = torch.randperm(experts + 2, generator=generator)[:experts].tolist()
    pairs = [(e, slots[e]) for e in range(experts) if torch.rand(1, generator=generator) < away]
    work = HostWork(pairs, experts, DEVICE)
    # What comes after the count is not read.
    work.experts_W[len(pairs) :], work.slots_W[len(pairs) :] = 0, slots[0]
    expected_SB = before_SB.clone()
    for expert, slot in pairs:
        expected_SB[slot] = rows_EB[expert] if has_row[expert] else 0xFF
    for gather in GATHERS:
        pool_SB = before_SB.to(DEVICE, copy=True)
        gather(source, work, pool_SB)
        assert torch.equal(pool_SB.cpu(), expected_SB), gather.__module__


@pytest.mark.parametrize("ctas", [1, 3, 100])
def test_however_many_ctas(ctas: int) -> None:
    rows_EB = random_rows(3, 40960, torch.Generator().manual_seed(0))
    pool_SB = torch.zeros(3, 40960, dtype=torch.uint8, device=DEVICE)
    with patch.object(copies, "COPY_CTAS", ctas), patch.object(copies, "machine", lambda device: (0, 100)):
        copies.page_gather(HostRows.of(list(rows_EB), DEVICE), HostWork.of([(0, 2), (1, 0), (2, 1)], DEVICE), pool_SB)
    assert torch.equal(pool_SB.cpu(), rows_EB[[1, 2, 0]])


@pytest.mark.parametrize("gather", GATHERS)
def test_a_slot_that_does_not_exist_is_left_out(gather: Gather) -> None:
    rows_EB = random_rows(3, 64, torch.Generator().manual_seed(1))
    pool_SB = torch.zeros(2, 64, dtype=torch.uint8, device=DEVICE)
    gather(HostRows.of(list(rows_EB), DEVICE), HostWork.of([(0, -1), (1, 1), (2, 2)], DEVICE), pool_SB)
    assert torch.equal(pool_SB.cpu(), torch.stack([torch.zeros(64, dtype=torch.uint8), rows_EB[1]]))


@pytest.mark.parametrize("gather", GATHERS)
def test_one_token_of_gathered_experts_has_the_resident_bits(gather: Gather) -> None:
    case = make_case(1, 2, 3, 40, 24, torch.float16, away=1.0)
    weights, slots = torch.ones(1, 2, device=DEVICE), case.slots_E[case.ids_TK[0].long()]
    results = []
    for brought in (False, True):
        if brought:
            away = Away(case)
            gather(away.source, away.work, case.pool.rows_SB)
        act, out = poisoned(2, 24, dtype=torch.float16), poisoned(1, 40, dtype=torch.float16)
        moe_gemv.moe_gemv_up(case.x_TH, case.pool.weights, slots, act)
        moe_gemv.moe_gemv_down(act, case.pool.weights, slots, weights, None, out)
        results.append(out)
    assert_same_bits(results[1], results[0])


def test_nothing_to_do_touches_nothing() -> None:
    pool_SB = torch.ones(2, 64, dtype=torch.uint8, device=DEVICE)
    source = HostRows.of([None], DEVICE)
    for work in (HostWork.of([], DEVICE), HostWork([], 4, DEVICE)):
        copies.page_gather(source, work, pool_SB)
    assert bool((pool_SB == 1).all())


def test_rows_that_a_kernel_cannot_read_are_refused() -> None:
    rows_EB = random_rows(2, 64, torch.Generator())
    for message, rows in {
        r"different lengths: \[48, 64\]": [rows_EB[0], rows_EB[1, :48]],
        "the row of expert 1 is torch.int8": [None, rows_EB[0].view(torch.int8)],
        "expert 0 has shape": [rows_EB],
        "expert 0 has gaps; its stride is 2": [rows_EB.view(-1)[::2]],
        "expert 0 does not begin and end on 16 bytes": [rows_EB[0, 8:56]],
        "expert 0 is on meta, not on the host": [rows_EB[0].to("meta")],
    }.items():
        with pytest.raises(KernelError, match=message):
            HostRows.of(rows, DEVICE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_rows_that_are_not_pinned_are_refused() -> None:
    with pytest.raises(KernelError, match="is not pinned"):
        HostRows.of([torch.zeros(64, dtype=torch.uint8)], DEVICE)


def test_wrong_operands_are_refused() -> None:
    source = HostRows.of(list(random_rows(2, 64, torch.Generator())), DEVICE)
    work, pool_SB = HostWork.of([(0, 0)], DEVICE), torch.zeros(2, 80, dtype=torch.uint8, device=DEVICE)
    for message, operands in {
        "rows have 64 bytes and the slots 80": (source, work, pool_SB),
        "pool_SB is torch.int8": (source, work, pool_SB.view(torch.int8)),
        "pool_SB must be contiguous": (source, work, pool_SB[:, :64]),
        "do not begin on 16 bytes": (source, work, pool_SB.view(-1)[8:136].view(2, 64)),
        "slots_W is torch.int64": (source, DeviceWork(work.experts_W, work.slots_W.long(), work.count_1), pool_SB),
        "one device": (source, work, pool_SB.to("meta")),
        "2147483648 bytes; fewer": (source, work, torch.empty(0, 2**31, dtype=torch.uint8, device=DEVICE)),
    }.items():
        with pytest.raises(KernelError, match=message):
            copies.page_gather(*operands)
