"""Memory that cannot be page-locked: one warning, the same bytes, and nothing left behind."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

from duoserve.experts import pinned
from duoserve.experts.layout import ExpertId
from duoserve.experts.store import HostStore
from tests.helpers.fakes import ArrayStore

REFUSED = 2


class FakeCudart:
    """Refuses to lock more than ``most`` bytes; ``locked`` are the addresses of what is."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.locked: list[int] = []
        self.forgotten = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if nbytes > self.most:
            return REFUSED
        self.locked.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        return 0

    def forget(self) -> None:
        self.forgotten += 1


def use(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(pinned, "_forget_error", cudart.forget)


def test_what_is_locked_is_unlocked_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart(most=1 << 20)
    use(cudart, monkeypatch)
    store = HostStore(ArrayStore(num_layers=1, num_experts=2), [ExpertId(0, 0), ExpertId(0, 1)], pinned=True)
    assert len(cudart.locked) == 1
    store.close()
    assert cudart.locked == [] and cudart.forgotten == 0
    store.close()


def test_a_store_that_nobody_closes_unlocks_its_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart(most=1 << 20)
    use(cudart, monkeypatch)
    store = HostStore(ArrayStore(num_layers=1, num_experts=1), [ExpertId(0, 0)], pinned=True)
    row_B = store.host_row(ExpertId(0, 0))
    assert row_B is not None and cudart.locked == [row_B.data_ptr()]
    del store
    gc.collect()
    assert cudart.locked == []


def test_what_is_refused_is_said_once_and_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart, source = FakeCudart(most=4096), ArrayStore(num_layers=1, num_experts=2)
    use(cudart, monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        stores = [HostStore(source, [ExpertId(0, e) for e in range(count)], pinned=True) for count in (1, 2)]
    assert [str(one.message).partition(":")[0] for one in said] == [
        "host memory could not be page-locked (CUDA error 2)"
    ]
    assert cudart.forgotten == 2 and cudart.locked == []
    row_B = stores[1].host_row(ExpertId(0, 1))
    assert row_B is not None and torch.equal(row_B, source.row(ExpertId(0, 1)))
    for store in stores:
        store.close()
