"""What experts are worth, by hand-made histories."""

from __future__ import annotations

import pytest

from duoserve.config import Phase
from duoserve.scheduling.ranking import Activation, DecayedFrequency, Frequency, LeastStale, Ranking, Recency

RANKINGS = [Recency, Frequency, DecayedFrequency, LeastStale, Activation]


def steps(ranking: Ranking, *steps: list[int], layer: int = 0) -> list[int]:
    """Experts in the order in which they would go, after decode steps that used these."""
    for experts in steps:
        ranking.begin(Phase.DECODE, 1)
        ranking.used(layer, experts, [1] * len(experts))
    return order(ranking, layer)


def order(ranking: Ranking, layer: int = 0) -> list[int]:
    values = ranking.values[layer]
    return sorted(range(len(values)), key=values.__getitem__)


@pytest.mark.parametrize("kind", RANKINGS)
def test_the_unused_go_first(kind: type[Ranking]) -> None:
    ranking = kind(2, 4)
    ranking.begin(Phase.PREFILL, 3)
    ranking.used(0, [2, 1], [2, 1])
    assert set(order(ranking)[:2]) == {0, 3}
    assert ranking.values[0][0] < ranking.values[0][1]


def test_recency_is_of_the_last_use_and_of_the_more_wanted_at_once() -> None:
    assert steps(Recency(1, 3), [0, 1], [2, 0]) == [1, 0, 2]


def test_frequency_never_forgets() -> None:
    assert steps(Frequency(1, 3), *[[0]] * 5, *[[1]] * 4, [2]) == [2, 1, 0]


def test_decayed_frequency_forgets_by_halves() -> None:
    ranking = DecayedFrequency(1, 2, half_life=4)
    steps(ranking, [0], *[[1]] * 4)
    recent = sum(2 ** (-age / 4) for age in range(4))
    assert ranking.values[0][1] / ranking.values[0][0] == pytest.approx(recent / 0.5)


def test_many_old_uses_outweigh_a_single_new_one_until_they_are_old() -> None:
    ranking = DecayedFrequency(1, 3, half_life=4)
    assert steps(ranking, *[[0]] * 6, [1]) == [2, 1, 0]
    assert steps(ranking, *[[2]] * 20, [1]) == [0, 1, 2]


def test_a_prompt_counts_in_shares_and_devalues_the_last_request() -> None:
    ranking = DecayedFrequency(1, 3, half_life=32, carry=0.25)
    steps(ranking, [0])
    ranking.begin(Phase.PREFILL, 1000)
    ranking.used(0, [1, 2], [1000, 500])
    old, every, half = ranking.values[0]
    assert every / half == pytest.approx(2)
    assert every / old == pytest.approx(32 / 0.6931 / 0.25, rel=1e-3)


def test_the_growth_of_decayed_frequency_is_taken_back_and_nothing_else_changes() -> None:
    plain, scaled = DecayedFrequency(1, 4, half_life=1), DecayedFrequency(1, 4, half_life=1)
    scaled._now = 1e29
    for ranking in (plain, scaled):
        steps(ranking, [0], [1], [0, 2], *[[3]] * 8)
    ratios = [value / ranking.values[0][3] for ranking in (plain, scaled) for value in ranking.values[0]]
    assert ratios[:4] == pytest.approx(ratios[4:])
    assert max(scaled.values[0]) < 1e10


def test_staleness_is_counted_in_turns_of_the_layer() -> None:
    ranking = LeastStale(2, 3)
    steps(ranking, [0], [1], [1], layer=0)
    assert steps(ranking, [0], [2], layer=1) == [1, 0, 2]
    assert ranking.values[0][1] - ranking.values[0][0] == 2


def test_activation_prefers_early_layers_and_forgets_at_a_prompt() -> None:
    ranking = Activation(4, 2)
    for layer in (0, 3):
        steps(ranking, [0], layer=layer)
    assert ranking.values[0][0] == pytest.approx(4 * ranking.values[3][0])
    ranking.begin(Phase.PREFILL, 10)
    assert ranking.values[0][0] == ranking.values[0][1] > ranking.values[3][0]
