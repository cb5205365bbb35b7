"""The curves of the planner: against published statistics, and against the generator that made them."""

from __future__ import annotations

import dataclasses

import pytest

from duoserve.planning.routing_curves import UNIFORM, curves_for, known_routings
from duoserve.replaying.cache_study import cached_hits
from duoserve.scheduling.policies import EVICTIONS
from duoserve.traces.synthetic import CARDS, synthesize

QWEN = curves_for(128, 8, "qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("name", "tokens", "distinct"),
    [
        ("qwen3-30b-a3b", 2, 12.50),
        ("qwen3-30b-a3b", 16, 39.09),
        ("qwen3-30b-a3b", 613, 101),
        ("mixtral-8x7b", 4, 4.90),
        ("gpt-oss-120b", 8, 17.76),
        ("gpt-oss-20b", 32, 19.62),
        ("deepseek-v2-lite", 8, 27.99),
    ],
)
def test_prompts_use_as_many_experts_as_published(name: str, tokens: int, distinct: float) -> None:
    card = CARDS[name]
    found = curves_for(card.num_experts, card.top_k, name).in_prompt(tokens)
    assert found == pytest.approx(distinct, rel=0.10)


@pytest.mark.parametrize(("share", "rate"), [(0.125, 0.674), (0.25, 0.840), (0.5, 0.962)])
def test_hit_rates_are_near_the_published_ones(share: float, rate: float) -> None:
    assert QWEN.hit_rate("lfru", share) == pytest.approx(rate, abs=0.035)


def test_a_point_is_what_a_cache_does_on_other_made_up_requests() -> None:
    card = dataclasses.replace(CARDS["gpt-oss-20b"], num_layers=2)
    trace = synthesize(card, 6, 192, 0.8, seed=99, prompt=64)
    curves = curves_for(32, 4, "gpt-oss-20b")
    for name in ("lru", "lfru"):
        measured = cached_hits(trace, 8, EVICTIONS[name].ranking, 1).rate
        assert curves.hit_rate(name, 0.25) == pytest.approx(measured, abs=0.03)


def test_curves_rise_from_nothing_to_all() -> None:
    rates = [QWEN.hit_rate("lru", step / 40) for step in range(41)]
    assert (rates[0], rates[-1]) == (0.0, 1.0)
    assert rates == sorted(rates)
    used = [QWEN.in_prompt(tokens) for tokens in (1, 2, 3, 50, 1000, 10**6)]
    assert used[0] == 8 and used == sorted(used) and used[-1] <= 128


@pytest.mark.parametrize("name", sorted({*CARDS, "bard", "bard-fine"}))
def test_curves_go_on_beyond_their_last_point_as_it_lies_beyond_the_one_before(name: str) -> None:
    curves = curves_for(1, 1, name)
    own = curves_for(curves.raw["num_experts"], curves.raw["top_k"], name)
    for curve, distinct in (("window", "in_prompt"), ("batch", "in_batch")):
        *_, (last, count) = own.raw[curve].items()
        shorter = {width: used for width, used in own.raw[curve].items() if width != last}
        cut = dataclasses.replace(own, raw=own.raw | {curve: shorter})
        assert getattr(cut, distinct)(int(last)) == pytest.approx(count, rel=0.03)
        beyond = [getattr(own, distinct)(int(last) * times) for times in (1, 1.01, 2, 3, 100, 10**6)]
        assert beyond == sorted(beyond) and beyond[-1] <= own.num_experts
        assert count == own.num_experts or beyond[2] > count + 0.1 * (own.num_experts - count)


def test_a_batch_asks_for_more_experts_and_finds_fewer() -> None:
    assert QWEN.in_batch(1) == 8 < QWEN.in_batch(4) < 4 * 8
    assert QWEN.hit_rate("lru", 0.25, 1) > QWEN.hit_rate("lru", 0.25, 2) > QWEN.hit_rate("lru", 0.25, 4)


def test_a_model_without_a_card_goes_by_the_nearest_scaled_to_its_own() -> None:
    deepseek = curves_for(256, 8)
    assert deepseek.name == "qwen3-30b-a3b"
    assert curves_for(8, 2, "mixtral-8x22b").name == "mixtral-8x7b"
    assert deepseek.in_prompt(1) == pytest.approx(8)
    # 4 of its tokens take as many of 256 experts as 2 of Qwen3's of 128, twice.
    assert deepseek.in_prompt(4) == pytest.approx(2 * QWEN.in_prompt(2))


def test_the_embedded_models_have_cards_and_stand_for_nobody_else() -> None:
    assert curves_for(8, 2, "bard").name == "bard"
    fine = curves_for(64, 8, "bard-fine")
    assert (fine.name, fine.raw["num_experts"], fine.raw["top_k"]) == ("bard-fine", 64, 8)
    assert curves_for(64, 8).name == "deepseek-v2-lite"
    for share, rate in ((0.25, 0.38), (0.5, 0.64), (0.75, 0.84)):  # bench/results/routing-embedded.md, other requests
        assert curves_for(8, 2, "bard").hit_rate("lru", share) == pytest.approx(rate, abs=0.04)


def test_by_chance_a_cache_hits_as_often_as_its_share() -> None:
    even = dataclasses.replace(CARDS["gpt-oss-20b"], num_layers=2, skew=0.0, request=0.0, slow=0.0, fast=0.0)
    trace = synthesize(even, 4, 192, 0.8, seed=5, prompt=64)
    chance = curves_for(32, 4, UNIFORM)
    for slots in (8, 16, 24):
        measured = cached_hits(trace, slots, EVICTIONS["lru"].ranking, 1).rate
        assert chance.hit_rate("lru", slots / 32) == pytest.approx(measured, abs=0.02)
    for tokens in (1, 4, 16):
        ids = trace[0].layers[0].topk_ids_NK
        windows = [len(set(ids[at : at + tokens].flatten())) for at in range(0, 192, tokens)]
        assert chance.in_prompt(tokens) == pytest.approx(sum(windows) / len(windows), rel=0.05)
        assert chance.in_batch(tokens) == chance.in_prompt(tokens)
    assert {"uniform", "bard", "qwen3-30b-a3b"} <= set(known_routings())
