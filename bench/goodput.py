"""The highest rate of arrivals at which nine requests in ten meet both of their objectives."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from duoserve import AsyncEngine, MoEModel, Objectives, SamplingParams, ServiceSettings
from duoserve.service import Times

ATTAINED = 0.9
SCHEDULERS = ("fcfs", "slo")
TTFT_SLOWER, TPOT_SLOWER = 8, 3  # objectives, in times of what a request takes alone
SEED = 0


@dataclass(frozen=True)
class Arrivals:
    """How a service is tried: ``requests`` a trial; from ``low`` to ``high`` times its rate alone, ``trials`` halvings.

    Prompts and answers are of mixed lengths: most short, some ``long`` times as long.
    """

    requests: int = 60
    trials: int = 6
    low: float = 0.25
    high: float = 6.0
    new_tokens: int = 24
    long: int = 8

    @classmethod
    def quick(cls) -> Arrivals:
        """A check of the bench."""
        return cls(requests=6, trials=1, new_tokens=4, long=2)


def goodputs(load: Callable[[], MoEModel], prompts: Sequence[list[int]], arrivals: Arrivals) -> dict[str, Any]:
    """Goodput by scheduler, all rates that were tried, and the objectives that were the same for both."""
    return asyncio.run(_goodputs(load, prompts, arrivals))


async def _goodputs(load: Callable[[], MoEModel], prompts: Sequence[list[int]], arrivals: Arrivals) -> dict[str, Any]:
    ttft_s, tpot_s = await _alone(load, prompts, arrivals)
    objectives = Objectives(TTFT_SLOWER * ttft_s, TPOT_SLOWER * tpot_s)
    capacity = 1 / (ttft_s + arrivals.new_tokens * tpot_s)
    found: dict[str, Any] = {"ttft_objective_s": objectives.ttft_s, "tpot_objective_s": objectives.tpot_s}
    for scheduler in SCHEDULERS:
        settings = ServiceSettings(max_waiting=4096, objectives=objectives, scheduler=scheduler)
        low, high, tried = arrivals.low * capacity, arrivals.high * capacity, []
        for _ in range(arrivals.trials):
            rate = (low * high) ** 0.5
            attained = await _trial(load, prompts, arrivals, settings, rate)
            tried.append({"rate": rate, "attained": attained})
            low, high = (rate, high) if attained >= ATTAINED else (low, rate)
        good = [trial["rate"] for trial in tried if trial["attained"] >= ATTAINED]
        found[scheduler] = {"goodput": max(good, default=None), "tried": tried}
    return found


async def _alone(load: Callable[[], MoEModel], prompts: Sequence[list[int]], arrivals: Arrivals) -> tuple[float, float]:
    """TTFT and TPOT of some requests one after another: medians."""
    service = AsyncEngine(load())
    try:
        times = [await _one(service, prompt, arrivals.new_tokens) for prompt in prompts[:8]]
    finally:
        await service.close()
    return _median([_ttft(t) for t in times]), _median([_tpot(t, arrivals.new_tokens) for t in times])


async def _trial(
    load: Callable[[], MoEModel],
    prompts: Sequence[list[int]],
    arrivals: Arrivals,
    settings: ServiceSettings,
    rate: float,
) -> float:
    """The share of requests that met both objectives, at ``rate`` a second; the same arrivals for every scheduler."""
    service, dice = AsyncEngine(load(), settings=settings), random.Random(SEED)
    try:
        for prompt in prompts[:2]:
            await _one(service, prompt, arrivals.new_tokens)
        tasks = []
        for number in range(arrivals.requests):
            stretch = arrivals.long if dice.random() < 1 / arrivals.long else 1
            prompt = (prompts[number % len(prompts)] * arrivals.long)[: len(prompts[0]) * stretch]
            new_tokens = dice.randint(arrivals.new_tokens // 2, 3 * arrivals.new_tokens // 2)
            tasks.append(asyncio.create_task(_met(service, prompt, new_tokens, settings.objectives)))
            await asyncio.sleep(dice.expovariate(rate))
        return sum(await asyncio.gather(*tasks)) / len(tasks)
    finally:
        await service.close()


async def _met(service: AsyncEngine, prompt: list[int], new_tokens: int, objectives: Objectives) -> bool:
    times = await _one(service, prompt, new_tokens)
    assert objectives.ttft_s is not None and objectives.tpot_s is not None
    return _ttft(times) <= objectives.ttft_s and _tpot(times, new_tokens) <= objectives.tpot_s


async def _one(service: AsyncEngine, prompt: list[int], new_tokens: int) -> Times:
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    stream = await service.submit(prompt, params)
    async for _ in stream:
        last = time.monotonic()
    return replace(stream.times, finished=stream.times.finished or last)


def _ttft(times: Times) -> float:
    assert times.first_token is not None
    return times.first_token - times.arrived


def _tpot(times: Times, new_tokens: int) -> float:
    assert times.first_token is not None and times.finished is not None
    return (times.finished - times.first_token) / max(1, new_tokens - 1)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
