"""Small models in two dtypes, and what they write, for runners that record their steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import save_mixtral
from tests.helpers.lagging import Truth
from tests.helpers.toys import toy_prompt

PROMPTS = [toy_prompt(length) for length in (7, 30, 1)]
MAX_TOKENS = (12, 5, 9)
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Truth]]:
    """Folders, and what a model in them writes, by dtype."""
    folders = {name: save_mixtral(tmp_path_factory.mktemp("model"), dtype=getattr(torch, name)) for name in DTYPES}
    return {name: (folder, Truth(folder, 24, PROMPTS, MAX_TOKENS)) for name, folder in folders.items()}


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest, models: dict[str, tuple[Path, Truth]]) -> tuple[Path, Truth]:
    return models[request.param]


@pytest.fixture(scope="module")
def folder(model: tuple[Path, Truth]) -> Path:
    return model[0]


@pytest.fixture(scope="module")
def truth(model: tuple[Path, Truth]) -> Truth:
    return model[1]
