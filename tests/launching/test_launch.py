"""Which launch a decode mode comes to, and what is refused; how the link is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duoserve import MoEModel
from duoserve.errors import ConfigError
from duoserve.experts.slots import SlotPool
from duoserve.kernels import HostRows
from duoserve.launching.launch import Launch, choose_launch
from duoserve.launching.link import LinkRates, link_rates
from duoserve.scheduling.policies import get_policy
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.fakes import SMALL, ArrayStore

GPU = torch.device("cuda", 0)
FAST, SLOW = LinkRates(copy=50e9, zero_copy=42.6e9), LinkRates(copy=50e9, zero_copy=42.4e9)


def unasked() -> LinkRates:
    raise AssertionError("the link was measured for nothing")


def choose(wanted: str, policy: str, readable: bool, measure: Callable[[], LinkRates] = unasked) -> Launch:
    return choose_launch(wanted, GPU, get_policy(policy), lambda: readable, measure)


@pytest.mark.parametrize(("rates", "launch"), [(FAST, Launch.GRAPH), (SLOW, Launch.EVENT)])
def test_auto_goes_by_the_link(rates: LinkRates, launch: Launch) -> None:
    assert choose("auto", "lru", True, lambda: rates) is launch


@pytest.mark.parametrize(
    ("wanted", "policy", "readable", "launch"),
    [
        ("auto", "lru", False, Launch.EVENT),
        ("auto", "on-demand", True, Launch.EVENT),
        ("auto", "layer-prefetch", True, Launch.EVENT),
        ("auto", "resident", False, Launch.GRAPH),
        ("graph", "resident", False, Launch.GRAPH),
        ("graph", "lru", True, Launch.GRAPH),
        ("graph", "lookahead", True, Launch.GRAPH),
        ("graph", "duoserve", True, Launch.GRAPH),
        ("event", "lru", True, Launch.EVENT),
        ("event", "resident", True, Launch.EVENT),
    ],
)
def test_what_needs_no_measurement(wanted: str, policy: str, readable: bool, launch: Launch) -> None:
    assert choose(wanted, policy, readable) is launch


@pytest.mark.parametrize(
    ("policy", "readable", "message"),
    [
        ("on-demand", True, "policy 'on-demand' moves experts between the layers"),
        ("lru", False, "not all experts lie in pinned host memory .*slot choose policy 'resident', .*ulimit -l"),
    ],
)
def test_a_graph_that_cannot_be_had_is_refused(policy: str, readable: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose("graph", policy, readable)


@pytest.mark.parametrize("wanted", ["event", "graph"])
def test_a_cpu_records_nothing(wanted: str, tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path)
    with pytest.raises(ConfigError, match=f"decode_mode='{wanted}' takes CUDA graphs, but the device is cpu"):
        MoEModel.from_pretrained(folder, device="cpu", decode_mode=wanted)
    with pytest.raises(ConfigError, match="decode_mode='always' is not known: use one of auto, event, graph"):
        MoEModel.from_pretrained(folder, device="cpu", decode_mode="always")


def test_the_link_is_measured_with_the_same_rows_both_ways() -> None:
    store, pool = ArrayStore(num_experts=8), SlotPool(3, SMALL, poison=True)
    rows = [store.row(expert) for expert in store.experts[:8]]
    took = iter([2.0, 0.5])

    def seconds(run: Callable[[], None]) -> float:
        pool.rows_SB.fill_(0)
        run()
        assert torch.equal(pool.rows_SB, torch.stack(rows[1:4]))
        return next(took)

    rates = link_rates(HostRows.of([None, *rows[1:]], "cpu"), pool, seconds)
    assert rates == LinkRates(copy=3 * SMALL.slot_bytes / 2, zero_copy=3 * SMALL.slot_bytes / 0.5)
