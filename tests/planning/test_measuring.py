"""Rates of the machine that the tests run on: all there, none absurd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duoserve.planning import measuring
from duoserve.planning.measuring import RATES, disk_rates, measure, num_matrices


def test_the_disk_is_read_in_pieces_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PIECES", 4)
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    found = disk_rates(tmp_path)
    assert found["disk"] >= found["reader"] > 1e6
    assert list(tmp_path.iterdir()) == []


def test_all_rates_of_a_cpu_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("PIECES", 2), ("ROUNDS", 1), ("WIDTH", 256), ("MATRICES", 4)):
        monkeypatch.setattr(measuring, name, small)
    monkeypatch.setattr(measuring, "last_cache_bytes", lambda: 0)
    found = measure(torch.device("cpu"), tmp_path)
    assert found.keys() == set(RATES)
    assert all(isinstance(rate, float) and rate > 0 for rate in found.values())
    assert found["layer_overhead_s"] < 1


@pytest.mark.parametrize(("cache", "free", "nbytes"), [(32, 1 << 15, 108), (384, 1 << 15, 768), (384, 6 << 10, 512)])
def test_memory_is_measured_by_more_than_the_caches_hold(
    cache: int, free: int, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In MiB; with the two operands of a copy, a quarter of what is free at most."""
    monkeypatch.setattr(measuring, "last_cache_bytes", lambda: cache << 20)
    monkeypatch.setattr(measuring, "free_bytes", lambda device: free << 20)
    assert num_matrices() * 4.5 == pytest.approx(nbytes, abs=4.5)
