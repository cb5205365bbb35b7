"""A recorded decode step by the Triton kernels themselves, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from duoserve import kernels
from duoserve.experts.layout import ExpertId
from tests.helpers.assembly import assembled
from tests.helpers.checkpoints import save_mixtral
from tests.helpers.lagging import LaggingDevice, Truth, write
from tests.kernels.common import INTERPRETED

PROMPTS, MAX_TOKENS = [[3], [1]], [3, 2]
TINY = {"num_hidden_layers": 2, "num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 1}


@INTERPRETED
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of work that is recorded before there is anything to read
def test_the_bits_of_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TRITON_ON_CPU", True)
    folder = save_mixtral(tmp_path, intermediate_size=16, **TINY)
    device = LaggingDevice(seed=6, in_ram=[ExpertId(layer, expert) for layer in range(2) for expert in range(4)])

    with assembled(
        folder, "lru", 5, device.copies, make_pool=device.pool, make_step_runner=device.recorded("graph")
    ) as engine:
        tokens = write(engine, PROMPTS, MAX_TOKENS)
        assert engine.meter.snapshot().misses["decode"] > 0
    truth = Truth(folder, 8, PROMPTS, MAX_TOKENS)
    assert tokens == truth.tokens and truth.differences(device.logits) == []
