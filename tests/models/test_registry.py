"""The registry: which families there are, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from duoserve.errors import ConfigError
from duoserve.models.registry import family_of


@pytest.mark.parametrize("architectures", [{}, {"architectures": None}, {"architectures": ["MixtralForCausalLM"]}])
def test_mixtral_is_known(architectures: dict[str, Any]) -> None:
    assert family_of({"model_type": "mixtral"} | architectures).model_type == "mixtral"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama'; supported: .*mixtral"),
        ({"model_type": ["mixtral"]}, r"model_type is \['mixtral'\]; supported: .*mixtral"),
        ({}, "model_type is absent; supported: .*mixtral"),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForSequenceClassification"]},
            r"architectures is \['Mixtral.*\]; supported: MixtralForCausalLM",
        ),
        ({"model_type": "mixtral", "architectures": "MixtralForCausalLM"}, "architectures is 'Mixtral.*'; supported"),
        ({"model_type": "mixtral", "architectures": []}, r"architectures is \[\]; supported: MixtralForCausalLM"),
    ],
)
def test_unknown_models_are_refused_with_what_is_supported(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family_of(raw)
