"""The named bundles."""

from __future__ import annotations

import pytest

from duoserve.config import Phase
from duoserve.errors import ConfigError
from duoserve.scheduling.policies import POLICIES, get_policy


def test_names() -> None:
    assert list(POLICIES) == ["resident", "on-demand", "layer-prefetch", "lru"]
    assert all(get_policy(name).name == name for name in POLICIES)
    assert [name for name in POLICIES if get_policy(name).all_resident] == ["resident"]


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"policy='mru' is not known.*'on-demand'.*'lru'"):
        get_policy("mru")


def test_only_plans_that_prefetch_look_ahead() -> None:
    looks = {(name, phase) for name in POLICIES for phase in Phase if get_policy(name).looks_ahead(phase)}
    assert looks == {("layer-prefetch", Phase.PREFILL), ("layer-prefetch", Phase.DECODE), ("lru", Phase.PREFILL)}
