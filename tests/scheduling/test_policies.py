"""The named bundles."""

from __future__ import annotations

import pytest

from duoserve.config import Phase
from duoserve.errors import ConfigError
from duoserve.scheduling.plan import GuessMode
from duoserve.scheduling.policies import POLICIES, get_policy


def test_names() -> None:
    assert list(POLICIES) == [
        "resident",
        "on-demand",
        "layer-prefetch",
        "lru",
        "activation-matrix",
        "lookahead",
        "duoserve-paper",
        "duoserve",
    ]
    assert all(get_policy(name).name == name for name in POLICIES)
    assert [name for name in POLICIES if get_policy(name).all_resident] == ["resident"]


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"policy='mru' is not known.*'on-demand'.*'lru'"):
        get_policy("mru")


def test_only_plans_that_prefetch_look_ahead() -> None:
    looks = {(name, phase) for name in POLICIES for phase in Phase if get_policy(name).looks_ahead(phase)}
    rings = {(name, Phase.PREFILL) for name in POLICIES if get_policy(name).prefill.has_ring}
    assert looks == {("layer-prefetch", Phase.PREFILL), ("layer-prefetch", Phase.DECODE)} | rings
    assert len(rings) == 5


def test_without_guesses_it_is_the_same_policy_and_no_predictor_is_heard() -> None:
    policy = get_policy("duoserve").without_guesses()
    assert policy.predictor is None and policy.guesses is GuessMode.NONE
    assert policy.eviction is get_policy("duoserve").eviction
