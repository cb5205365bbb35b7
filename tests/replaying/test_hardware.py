"""The numbers that a replay's clock runs by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duoserve.errors import ConfigError
from duoserve.replaying.hardware import HARDWARE, Hardware, LayerSizes, Machine, find_hardware

MACHINE = Machine(
    Hardware("x", link=1e9, memory=1e10, flops=1e12, copy_latency_s=1e-3, layer_overhead_s=2e-3),
    LayerSizes("y", expert_params=1_000_000, expert_bits=4, other_params=500_000, attention_width=64),
)


def test_a_copy_is_latency_and_bytes_over_the_link() -> None:
    assert MACHINE.sizes.expert_bytes == 500_000
    assert MACHINE.hardware.copy_s(500_000) == pytest.approx(1e-3 + 5e-4)


def test_one_token_is_bound_by_memory_and_many_by_arithmetic() -> None:
    assert MACHINE.expert_s(1) == MACHINE.one_token_s == pytest.approx(5e-5)
    assert MACHINE.expert_s(1000) == pytest.approx(2e9 / 1e12)
    assert MACHINE.attention_s(1, 0) == pytest.approx(2e-3 + 1e-4)
    long = MACHINE.attention_s(1000, 0) - 2e-3
    assert long == pytest.approx((2 * 1000 * 500_000 + 4 * 500_000 * 64) / 1e12)


def test_on_a_cpu_experts_cost_time_of_their_own_and_weights_are_widened_for_many_rows() -> None:
    traits = replace(MACHINE.hardware, expert_overhead_s=1e-3, widening=1e9)
    cpu = Machine(traits, MACHINE.sizes)
    assert cpu.expert_s(1) == pytest.approx(1e-3 + 5e-5)
    assert cpu.expert_s(1000) == pytest.approx(1e-3 + 5e-4 + 2e-3)
    assert cpu.attention_s(1, 0) == MACHINE.attention_s(1, 0)
    assert cpu.attention_s(1000, 0) == pytest.approx(MACHINE.attention_s(1000, 0) + 1e-3)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"hardware 'abacus'.*rtx4090"):
        find_hardware("abacus")
    assert find_hardware("a5000") is HARDWARE["a5000"]
