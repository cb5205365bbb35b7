"""Whatever a config.json holds, each family reads it or refuses it with a ConfigError; nothing else comes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duoserve.errors import ConfigError
from duoserve.models.registry import FAMILIES
from tests.models.cases import FAMILIES as CASES
from tests.models.cases.case import SMALL
from tests.models.test_defaults import DEFAULTS

VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 10**30, 0.5, float("nan"), float("inf"), "", "silu", [], {}]),
    st.lists(st.sampled_from([0, 1, -1, None, "full_attention", "sliding_attention", 10**30]), max_size=4),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "rope_theta", "factor", "mscale", "mscale_all_dim", "beta_fast"]),
        st.sampled_from(["yarn", "default", 0, 1, 0.5, 4.0, -1, None, float("nan")]),
    ),
)
EXTRA = [
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "head_dim",
    "dtype",
    "layer_types",
    "n_group",
    "topk_group",
    "moe_layer_freq",
    "scoring_func",
    "topk_method",
    "quantization_config",
    "num_experts",
    "num_local_experts",
]


@pytest.mark.parametrize("model_type", CASES)
def test_what_transformers_has_for_every_model_is_refused(model_type: str) -> None:
    """Tokens that see those behind them, and layers with numbers of their own."""
    (family,) = (family for family in FAMILIES if family.model_type == model_type)
    raw = SMALL | dict(CASES[model_type].base)
    harmless = raw | {"is_causal": True, "per_layer_config": {}}
    assert family.parse_config(harmless) == family.parse_config(raw)
    for changes, message in (
        ({"is_causal": False}, "is_causal is False; supported: true"),
        ({"is_causal": None}, "is_causal is None; it must be true or false"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 0.1}}}, "per_layer_config is .*; supported: null"),
    ):
        with pytest.raises(ConfigError, match=message):
            family.parse_config(raw | changes)


@pytest.mark.parametrize("family", FAMILIES[1:], ids=lambda family: family.model_type)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_config_is_read_or_refused(family: Any, data: st.DataObject) -> None:
    names = st.sampled_from([*DEFAULTS[family.model_type], *EXTRA])
    base = SMALL | dict(CASES[family.model_type].base)
    raw = base | data.draw(st.dictionaries(names, VALUES, max_size=4))
    try:
        config = family.parse_config(raw)
    except ConfigError:
        return
    assert 1 <= config.top_k <= config.num_experts
    assert config.moe_layers and config.blocks.rope.dim % 2 == 0
    shapes = family.tensor_shapes(config)
    assert all(size > 0 for shape in shapes.values() for size in shape)
