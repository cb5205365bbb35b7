"""The bench of replays against reality: its verdicts by hand, and all of it on two small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reality import report as reality_report
from reality.machine import disturbed, listening, readers, undisturbed
from reality.probe import Rates
from tests.bench.conftest import Ran


def model_with(*errors: tuple[float, float]) -> dict[str, Any]:
    cells = [
        {"policy": "lru", "slots": slots, "errors": {"ttft_s": ttft, "tpot_s": tpot}}
        for slots, (ttft, tpot) in enumerate(errors)
    ]
    return {"model": "m", "cells": cells}


def test_a_verdict_needs_every_cell() -> None:
    ttft, tpot = reality_report.targets([model_with((0.1, -0.15), (-0.2, 0.05), (0.0, 0.1))])
    assert (ttft["inside"], ttft["cells"], ttft["reached"], ttft["worst"]) == (2, 3, False, "-20.0% (lru, 1 slots)")
    assert (tpot["inside"], tpot["reached"], tpot["median"]) == (3, True, pytest.approx(0.1))


def test_copy_threads_come_from_reads_and_disturbed_steps_alone() -> None:
    milliseconds = {
        "step told": 10.0,
        "step with a read": 14.0,  # a layer: 0.4 for the read and waking, the rest until the host goes on
        "step beside 1": 10.0 + 4 * (0.1 + 0.2 + 0.05),
        "step beside 2": 10.0 + 4 * (0.2 + 0.4 + 0.1),
        "step beside 8": 10.0 + 4 * (0.2 + 0.4 + 0.4),
        "prompt told": 30.0,
        "prompt beside 8": 30.0 + 4 * (0.2 + 0.1),
        "rouse": 0.1,
        "wake": 0.1,
        "read": 0.5,
        "read of all": 0.7,
        "notice": 0.05,
        "cold": 0.6,
        "warm": 0.5,
        "together": 0.4,
        "queue": 0.01,
    }
    rates = Rates({name: [1e-3 * value] for name, value in milliseconds.items()})
    for name, woken, ended in (("step beside 1", 4, 4), ("step beside 2", 8, 8), ("step beside 8", 8, 32)):
        rates.note(f"{name} woken", woken)
        rates.note(f"{name} ended", ended)
    rates.note("prompt beside 8 woken", 8)
    rates.note("prompt beside 8 ended", 32)
    found = readers(rates, 1_000_000, threads=2, layers=4)
    assert (found.alone, found.together) == (pytest.approx(2e9), pytest.approx(2e6 / 0.7e-3))
    assert found.between_s == pytest.approx(2 * 0.4e-3 - 0.7e-3)
    assert found.resumed_s == pytest.approx(1e-3 - 0.1e-3 - 0.5e-3 - 0.05e-3)
    assert found.warm == pytest.approx(1.2)
    assert disturbed(rates, "step") == pytest.approx((0.2e-3, 0.05e-3))
    assert disturbed(rates, "prompt") == pytest.approx((0.01e-3, 0.01e-3))


def test_what_a_prompt_takes_is_measured_beside_its_requests_where_those_differ_too_much() -> None:
    milliseconds = {"told of a prompt": 0.1, "told of a prompt with scores": 0.3}
    milliseconds |= {"step plain": 10.0, "step told": 10.4, "step scored": 11.2}
    rates = Rates({name: [1e-3 * value] for name, value in milliseconds.items()})
    assert listening(rates, "prompt", 4) == pytest.approx((0.1e-3, 0.2e-3))
    assert listening(rates, "step", 4) == pytest.approx((0.1e-3, 0.2e-3))
    assert undisturbed(rates, "step", 4) == pytest.approx(10e-3)
    for name, seconds in (("plain", 0.05), ("told", 0.0404), ("scored", 0.0612)):
        rates.note(f"prompt {name}", seconds)
    assert undisturbed(rates, "prompt", 4) == pytest.approx(0.05)


def test_the_command(bench_result: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    out, printed, result = bench_result("bench_reality", "--quick", "--threads", "1", "--folder", str(folder))
    assert [model["model"] for model in result["models"]] == ["bard", "mixtral-tiny"]
    assert result["command"].endswith("--folder DIR")
    assert len(result["checks"]) == 6 and all(check["passed"] for check in result["checks"])
    for model in result["models"]:
        assert {cell["policy"] for cell in model["cells"]} == {"on-demand", "lru", "duoserve"}
        for cell in model["cells"]:
            assert len(cell["measured"]["tpot_s"]) == len(cell["replayed"]["tpot_s"]) == 1
            # What was traced was really replayed: without guesses, the same experts are there.
            if cell["policy"] != "duoserve":
                hits = cell["hit_rates"]
                assert hits["measured"] == pytest.approx(hits["replayed"], abs=0.05)
    assert "checks the bench and measures nothing" in printed
    assert out.with_suffix(".md").read_text().startswith("**Warning")
