"""Formulas on round numbers, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duoserve.planning.sizes import ModelSizes
from duoserve.planning.speed import Costs, PromptSpec, StepSpec, chances
from duoserve.replaying.hardware import Hardware, LayerSizes, Machine
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.policies import POLICIES

# A copy takes 1 ms, an expert 10 us, all else of a layer 20 us and 100 us of overhead; arithmetic is free.
HARDWARE = Hardware("round", link=1e9, memory=1e11, flops=1e30, copy_latency_s=0.0, layer_overhead_s=1e-4, disk=0.5e9)
LAYER = LayerSizes("round", expert_params=500_000, expert_bits=16, other_params=1_000_000, attention_width=0)
SIZES = ModelSizes(LAYER, ModelShape(8, 2, (0, 1, 2, 3)), dense_params=0, head_params=5_000_000, kv_bytes=0)
IN_RAM = Costs(Machine(HARDWARE, LAYER), SIZES, ram_share=1.0)
ON_DISK = replace(IN_RAM, ram_share=0.0)
BEFORE, ONE, COPY, HEAD = 120e-6, 10e-6, 1e-3, 100e-6


def step(hit_rate: float) -> StepSpec:
    return StepSpec(sequences=1, context=0, asked=2.0, hit_rate=hit_rate)


def test_a_resident_step_is_bound_by_memory_and_overhead() -> None:
    found = IN_RAM.decode(POLICIES["resident"], step(0.0))
    assert found.total == pytest.approx(4 * (BEFORE + 2 * ONE) + HEAD)
    assert found.busy["link"] == found.busy["disk"] == 0.0
    assert found.busy["memory"] == pytest.approx(4 * (20e-6 + 2 * ONE) + HEAD)
    assert found.bound == "overhead"


def test_a_miss_costs_its_copy_and_what_cannot_be_computed_meanwhile() -> None:
    all_missing = IN_RAM.decode(POLICIES["lru"], step(0.0))
    assert all_missing.total == pytest.approx(4 * (BEFORE + 2 * COPY + ONE) + HEAD)
    assert (all_missing.bound, all_missing.busy["link"]) == ("link", pytest.approx(8 * COPY))
    none_missing = IN_RAM.decode(POLICIES["lru"], step(1.0))
    assert none_missing.total == pytest.approx(4 * (BEFORE + 2 * ONE) + HEAD)
    half = 0.25 * 2 * ONE + 0.5 * (COPY + ONE) + 0.25 * (2 * COPY + ONE)
    assert IN_RAM.decode(POLICIES["lru"], step(0.5)).total == pytest.approx(4 * (BEFORE + half) + HEAD)


@pytest.mark.parametrize("count", [1, 8, 4096])
@pytest.mark.parametrize("chance", [0.0, 1e-9, 0.3, 1.0])
def test_chances_are_those_of_the_binomial_distribution(count: int, chance: float) -> None:
    found = list(chances(count, chance))
    assert [hits for hits, _ in found] == list(range(count + 1))
    assert sum(share for _, share in found) == pytest.approx(1)
    assert sum(hits * share for hits, share in found) == pytest.approx(count * chance)
    assert sum((hits - count * chance) ** 2 * share for hits, share in found) == pytest.approx(
        count * chance * (1 - chance), rel=1e-9, abs=1e-12
    )


def test_on_demand_computes_nothing_meanwhile() -> None:
    found = IN_RAM.decode(POLICIES["on-demand"], step(0.9))
    assert found.total == pytest.approx(4 * (BEFORE + 2 * COPY + 2 * ONE) + HEAD)


def test_from_the_disk_a_copy_takes_as_long_as_the_slower_of_both() -> None:
    found = ON_DISK.decode(POLICIES["lru"], step(0.0))
    assert found.total == pytest.approx(4 * (BEFORE + 4 * COPY + ONE) + HEAD)
    assert (found.bound, found.busy["disk"], found.busy["link"]) == (
        "disk",
        pytest.approx(16 * COPY),
        pytest.approx(8 * COPY),
    )
    half = replace(IN_RAM, ram_share=0.5)
    assert half.copy_s == pytest.approx(1.5 * COPY)


def test_on_a_cpu_nothing_from_the_disk_crosses_the_link_and_whole_guesses_are_read() -> None:
    on_cpu = replace(ON_DISK, machine=Machine(replace(HARDWARE, host_computes=True, link=0.1e9), LAYER))
    found = on_cpu.decode(POLICIES["layer-prefetch"], step(0.0))
    assert found.busy["link"] == 0.0
    assert found.busy["disk"] == pytest.approx(4 * (2 + 2) * 2 * COPY)
    assert found.total == pytest.approx(4 * (BEFORE + (2 + 1) * 2 * COPY + 2 * ONE) + HEAD)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_guesses_are_in_vain_as_threads_read(threads: int) -> None:
    on_cpu = replace(ON_DISK, machine=Machine(replace(HARDWARE, host_computes=True), LAYER), copy_threads=threads)
    found = on_cpu.decode(POLICIES["layer-prefetch"], step(0.0))
    assert found.busy["disk"] == pytest.approx(4 * (2 + threads) * 2 * COPY)


def test_keys_and_values_of_a_long_context_are_read_too() -> None:
    long = replace(IN_RAM, model=replace(SIZES, kv_bytes=100))
    grown = long.decode(POLICIES["resident"], StepSpec(2, 1000, 2.0, 0.0)).total
    assert grown - long.decode(POLICIES["resident"], StepSpec(2, 0, 2.0, 0.0)).total == pytest.approx(4 * 2e5 / 1e11)


def prompt(tokens: int, used: float, resident: float) -> PromptSpec:
    return PromptSpec(tokens=tokens, sequences=1, used=used, resident=resident)


def test_a_long_prompt_takes_the_link_or_the_computation_whichever_is_longer() -> None:
    found = IN_RAM.prefill(POLICIES["duoserve"], prompt(1000, 8, 0.25))
    assert found.total == pytest.approx(4 * 6 * COPY + ONE + HEAD)
    assert found.bound == "link"
    slow = replace(IN_RAM, machine=Machine(replace(HARDWARE, flops=1e11), LAYER))
    work = 4 * (1e-4 + 2 * 1000 * 1_000_000 / 1e11 + 1000 * 2 * 2 * 500_000 / 1e11)
    found = slow.prefill(POLICIES["duoserve"], prompt(1000, 8, 0.25))
    assert found.total == pytest.approx(work + HEAD)
    assert found.bound == "compute"


def test_a_short_prompt_waits_for_its_routers() -> None:
    found = IN_RAM.prefill(POLICIES["lru"], prompt(2, 3.0, 0.0))
    assert found.total == pytest.approx(4 * (BEFORE + 3 * COPY + ONE) + HEAD)


@pytest.mark.parametrize(
    ("policy", "copies"), [("resident", 0), ("on-demand", 5), ("layer-prefetch", 5), ("lru", 2.5), ("duoserve", 2.5)]
)
def test_what_each_policy_copies_for_a_prompt(policy: str, copies: float) -> None:
    found = IN_RAM.prefill(POLICIES[policy], prompt(1000, 5, 0.5))
    assert found.busy["link"] == pytest.approx(4 * copies * COPY)


def test_scores_count_within_a_sequence_only() -> None:
    machine = Machine(replace(HARDWARE, flops=1e9), replace(LAYER, attention_width=64))
    apart = machine.attention_flops(100, 0, 10) - machine.attention_flops(100, 0, 100)
    assert apart == pytest.approx(4 * 64 * 100 * (5 - 0.5))


def test_a_read_alone_is_slower_than_reads_together() -> None:
    """Two threads read 1 GB/s, one alone 0.6: one miss takes 1/0.6 ms, two take 2 ms, three in two turns 2/0.6 ms.

    A single thread takes a turn for each.
    """
    disk = replace(HARDWARE, host_computes=True, disk=1e9, reader=0.6e9)
    on_cpu = replace(ON_DISK, machine=Machine(disk, LAYER))
    for asked, reads in ((1.0, 1 / 0.6), (2.0, 2.0), (3.0, 2 / 0.6)):
        found = on_cpu.decode(POLICIES["on-demand"], StepSpec(1, 0, asked, 0.0))
        assert found.total == pytest.approx(4 * (BEFORE + reads * COPY + asked * ONE) + HEAD)
    single = replace(on_cpu, copy_threads=1)
    found = single.decode(POLICIES["on-demand"], StepSpec(1, 0, 3.0, 0.0))
    assert found.total == pytest.approx(4 * (BEFORE + 3 / 0.6 * COPY + 3 * ONE) + HEAD)
    in_ram = replace(on_cpu, ram_share=1.0)
    found = in_ram.decode(POLICIES["on-demand"], StepSpec(1, 0, 1.0, 0.0))
    assert found.total == pytest.approx(4 * (BEFORE + COPY + ONE) + HEAD)
