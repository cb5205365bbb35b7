"""Requests arrive at a service at random, first come first served and by slack: how many meet their objectives."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from batching.goodput_search import Search, goodput
from duoserve import AsyncEngine, MoEModel, Objectives, SamplingParams, ServiceSettings
from duoserve.interface import Times
from duoserve.loadtest.workload import Workload
from duoserve.metrics import percentile

SCHEDULERS = ("fcfs", "slo")
# Objectives: three times a token's time alone, and for the first token as many times more as 2 s are of 100 ms.
TPOT_SLOWER, TTFT_OF_TPOT = 3, 20
SEED = 7
MOST = 2000  # requests of a trial


@dataclass(frozen=True)
class Trials:
    """How a service is tried: for ``seconds`` at each rate, and with no less than ``requests``.

    Rates begin at ``start`` times that of requests one after another. Lengths have ShareGPT's means and spread, cut to
    what a trial has time for.
    """

    seconds: float = 40.0
    requests: int = 200
    trials: int = 6
    start: float = 1.2
    growth: float = 1.35
    max_prompt: int = 256
    max_tokens: int = 96

    def count(self, rate: float) -> int:
        """Requests of a trial."""
        return min(MOST, max(self.requests, round(rate * self.seconds)))

    def workload(self) -> Workload:
        """The same requests, and the same gaps but for the rate, for every scheduler and rate."""
        return Workload(MOST, "poisson", self.max_prompt, self.max_tokens, SEED)


class Outcome(NamedTuple):
    """Of a request: seconds to the first token, and for each later one on the average."""

    ttft_s: float
    tpot_s: float


def goodputs(load: Callable[[], MoEModel], ids: Sequence[int], trials: Trials) -> dict[str, Any]:
    """Goodput by scheduler, all rates that were tried, and the objectives that were the same for both."""
    return asyncio.run(_goodputs(load, ids, trials))


async def _goodputs(load: Callable[[], MoEModel], ids: Sequence[int], trials: Trials) -> dict[str, Any]:
    prompts = _Prompts(ids, trials)
    alone = await _alone(load, prompts)
    objectives = Objectives(TTFT_OF_TPOT * TPOT_SLOWER * alone.tpot_s, TPOT_SLOWER * alone.tpot_s)
    start = trials.start / (alone.ttft_s + prompts.mean_tokens * alone.tpot_s)
    found: dict[str, Any] = {
        "alone": alone._asdict(),
        "ttft_objective_s": objectives.ttft_s,
        "tpot_objective_s": objectives.tpot_s,
        "seconds": trials.seconds,
        "mean_prompt": prompts.mean_prompt,
        "mean_tokens": prompts.mean_tokens,
    }
    services = {
        name: AsyncEngine(load(), settings=ServiceSettings(max_waiting=4096, objectives=objectives, scheduler=name))
        for name in SCHEDULERS
    }
    try:
        tried = await _tried(services, prompts, objectives, Search(start, trials.growth, trials.trials))
    finally:
        for service in services.values():
            await service.close()
    return found | {
        name: {"goodput": goodput([(trial["rate"], trial["attained"]) for trial in rows]), "tried": rows}
        for name, rows in tried.items()
    }


async def _tried(
    services: dict[str, AsyncEngine], prompts: _Prompts, objectives: Objectives, search: Search
) -> dict[str, list[dict[str, Any]]]:
    """Trials of each service by rate. They take turns, so that all hear the same of what the machine is up to."""
    searches = {name: replace(search, tried={}) for name in services}
    tried: dict[str, list[dict[str, Any]]] = {name: [] for name in services}
    for service in services.values():
        await _outcomes(service, prompts, search.start, 12)
    while any(one.next_step() is not None for one in searches.values()):
        for name, one in searches.items():
            step = one.next_step()
            if step is not None:
                rate = one.rate(step)
                outcomes = await _outcomes(services[name], prompts, rate, prompts.trials.count(rate))
                trial = summary(outcomes, objectives)
                one.tried[step] = trial["attained"]
                tried[name].append({"rate": rate, "requests": len(outcomes), **trial})
                print(f"{name} {rate:.2f}/s: {trial['attained']:.1%} inside objectives", file=sys.stderr)
    return {name: sorted(rows, key=lambda row: row["rate"]) for name, rows in tried.items()}


def summary(outcomes: Sequence[Outcome], objectives: Objectives) -> dict[str, Any]:
    """What came of a trial."""
    ttft_s, tpot_s = objectives.ttft_s or 0.0, objectives.tpot_s or 0.0
    ttfts, tpots = [one.ttft_s for one in outcomes], [one.tpot_s for one in outcomes]
    return {
        "attained": sum(objectives.met(one.ttft_s, one.tpot_s) for one in outcomes) / len(outcomes),
        "first_in_time": sum(one <= ttft_s for one in ttfts) / len(outcomes),
        "later_in_time": sum(one <= tpot_s for one in tpots) / len(outcomes),
        "ttft_p95_s": percentile(ttfts, 95),
        "tpot_p95_s": percentile(tpots, 95),
    }


class _Prompts:
    """The requests of a workload as token ids: passages of ``ids`` of the lengths that it draws."""

    def __init__(self, ids: Sequence[int], trials: Trials) -> None:
        self.trials = trials
        self._workload, dice = trials.workload(), random.Random(SEED)
        self.asked: list[tuple[list[int], int]] = []
        for words, max_tokens in self._workload.asked():
            length = len(words.split())
            begin = dice.randrange(len(ids) - length)
            self.asked.append((list(ids[begin : begin + length]), max_tokens))
        self.mean_prompt = sum(len(prompt) for prompt, _ in self.asked) / len(self.asked)
        self.mean_tokens = sum(tokens for _, tokens in self.asked) / len(self.asked)

    def times(self, rate: float) -> list[float]:
        """When each request comes."""
        return self._workload.times(rate)


async def _alone(load: Callable[[], MoEModel], prompts: _Prompts) -> Outcome:
    """Requests one after another, behind two that count for nothing: medians."""
    service = AsyncEngine(load())
    try:
        asked = [one for one in prompts.asked if one[1] > 1][:10]
        outcomes = [await _one(service, prompt, tokens) for prompt, tokens in asked]
    finally:
        await service.close()
    measured = outcomes[2:] or outcomes
    return Outcome(median(one.ttft_s for one in measured), median(one.tpot_s for one in measured))


async def _outcomes(service: AsyncEngine, prompts: _Prompts, rate: float, requests: int) -> list[Outcome]:
    """The first ``requests`` at ``rate`` a second, until the last is done."""
    loop = asyncio.get_running_loop()
    began, tasks = loop.time(), []
    for at, (prompt, tokens) in zip(prompts.times(rate)[:requests], prompts.asked[:requests], strict=True):
        await asyncio.sleep(began + at - loop.time())
        tasks.append(asyncio.create_task(_one(service, prompt, tokens)))
    return await asyncio.gather(*tasks)


async def _one(service: AsyncEngine, prompt: list[int], max_tokens: int) -> Outcome:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    stream = await service.submit(prompt, params)
    async for _ in stream:
        pass
    return outcome(stream.times, max_tokens)


def outcome(times: Times, tokens: int) -> Outcome:
    """By the engine's clock, from when the request was submitted."""
    assert times.first_token is not None and times.finished is not None
    tpot_s = (times.finished - times.first_token) / (tokens - 1) if tokens > 1 else 0.0
    return Outcome(times.first_token - times.arrived, tpot_s)
