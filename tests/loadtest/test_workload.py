"""Loads: the same for a seed, as long and as dense as they were asked for."""

from __future__ import annotations

import pytest

from duoserve.loadtest.workload import ANSWER_MEAN, BURST, PROMPT_MEAN, Workload


def test_a_seed_says_it_all() -> None:
    one, same, other = (Workload(20, seed=seed) for seed in (1, 1, 2))
    assert one.asked() == same.asked() != other.asked()
    assert one.times(2.0) == same.times(2.0) != other.times(2.0)


def test_lengths_are_sharegpts_on_average() -> None:
    asked = Workload(4000, max_prompt=100_000, max_tokens=100_000).asked()
    assert sum(len(each.prompt.split()) for each in asked) / 4000 == pytest.approx(PROMPT_MEAN, rel=0.1)
    assert sum(each.max_tokens for each in asked) / 4000 == pytest.approx(ANSWER_MEAN, rel=0.1)


def test_lengths_stay_inside_and_are_not_all_alike() -> None:
    asked = Workload(500, max_prompt=20, max_tokens=8).asked()
    words, tokens = [len(each.prompt.split()) for each in asked], [each.max_tokens for each in asked]
    assert (min(words), max(words)) == (1, 20) and (min(tokens), max(tokens)) == (1, 8)
    assert sum(tokens) / 500 < 4  # most are short


@pytest.mark.parametrize("arrivals", ["poisson", "burst"])
def test_requests_come_at_the_rate(arrivals: str) -> None:
    times = Workload(8000, arrivals).times(5.0)
    assert times == sorted(times) and times[0] == 0.0 and len(times) == 8000
    assert 8000 / times[-1] == pytest.approx(5.0, rel=0.1)
    assert len(set(times)) == (8000 if arrivals == "poisson" else 8000 // BURST)
