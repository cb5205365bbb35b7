"""A made-up model whose routers are predicted in several ways, and predictors that were trained on its trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from duoserve.predictors import training
from duoserve.predictors.base import RowPredictor
from duoserve.traces.synthetic import CARDS, synthesize
from duoserve.traces.trace import MemoryRows, Trace

QUICK = {"epochs": 4, "epoch_rows": 4000}


@pytest.fixture(scope="session")
def trace() -> Trace:
    """16 requests of 3 + 60 tokens over 4 layers of 8 experts. Look-ahead scores are right in 60 % of the cases, and
    half of the tokens choose at layer 2 the experts behind those of layer 1.
    """
    made = synthesize(replace(CARDS["mixtral-8x7b"], num_layers=4), 16, 60, 0.6, seed=0, prompt=3)
    tensors = {name: made.read(name) for name in made.meta.columns()}
    follow = np.random.default_rng(0).random(made.num_tokens) < 0.5
    tensors["topk_ids.2"][follow] = (tensors["topk_ids.1"][follow] + 1) % 8
    return Trace(made.meta, MemoryRows(tensors))


@pytest.fixture(scope="session")
def trained(trace: Trace) -> dict[str, tuple[RowPredictor, list[int]]]:
    """Every kind, and the requests that it has not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LAYER_RECIPE", replace(training.LAYER_RECIPE, **QUICK))
        patch.setattr(training, "PAPER_RECIPE", replace(training.PAPER_RECIPE, **QUICK | {"epochs": 20}, width=64))
        return {kind: training.train(trace, kind, horizon=3) for kind in training.KINDS}
