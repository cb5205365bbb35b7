"""What a pass reads, against all that a checkpoint holds."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from duoserve.models.opened import opened
from duoserve.planning.formats import layout_in
from duoserve.planning.model_cards import find_model
from duoserve.planning.sizes import layer_sizes, sizes_of
from duoserve.scheduling.hardware import SIZES, find_sizes
from tests.models.cases import FAMILIES


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v2-lite", "gpt-oss-20b", "glm-4.5-air", "bard"])
def test_every_parameter_is_in_one_place(name: str) -> None:
    model = find_model(name)
    config = model.config
    sizes = sizes_of(model.family, model.config, layout_in(config, "bf16", config.dtype), config.dtype)
    num_layers = len(config.moe_layers)
    summed = num_layers * (sizes.layer.other_params + config.num_experts * sizes.layer.expert_params)
    summed += sizes.dense_params + sizes.head_params
    total = sum(map(prod, model.family.tensor_shapes(config).values()))
    embeddings = 0 if config.tie_word_embeddings else sizes.head_params
    final_norm = config.hidden_size
    assert 0 <= total - summed - embeddings - final_norm < num_layers


@pytest.mark.parametrize("name", SIZES)
def test_layers_are_those_of_the_replays_cards(name: str) -> None:
    """Norms and biases are not in these: a thousandth of a layer, but for experts' biases, of which few are read."""
    model, card = find_model(name), find_sizes(name)
    layout = layout_in(model.config, "bf16", model.config.dtype)
    found = sizes_of(model.family, model.config, layout, model.config.dtype).layer
    assert (found.expert_params, found.attention_width) == (card.expert_params, card.attention_width)
    beside = [need for name, need in model.family.dense_needs(model.config).items() if ".experts." in name]
    biases = sum(prod(need.shape) for need in beside) // len(model.config.moe_layers)
    assert found.other_params - biases == pytest.approx(card.other_params, rel=1e-3)
    assert found.expert_bytes == 2 * card.expert_params


def test_shared_experts_are_read_by_every_token_and_dense_layers_are_apart() -> None:
    model = find_model("deepseek-v2-lite")
    sizes = sizes_of(model.family, model.config, layout_in(model.config, None, model.config.dtype), model.config.dtype)
    assert sizes.layer.other_params > 3 * 2048 * 2816
    assert sizes.dense_params > 3 * 2048 * 10944
    assert sizes.shape.layers == tuple(range(1, 27))
    assert sizes.kv_bytes == 576 * 2


def test_a_checkpoints_layer_has_its_own_bytes_shared_experts_included(tmp_path: Path) -> None:
    cases = FAMILIES["deepseek_v2"]
    with opened(cases.save(tmp_path, cases.hard)) as found:
        sizes, hidden = layer_sizes(found), found.config.hidden_size
        assert sizes.expert_params == 3 * hidden * 12
        assert sizes.expert_bytes == found.layout(found.config.dtype).slot_bytes
        assert sizes.other_bits == 32
    assert sizes.other_params > 3 * hidden * 2 * 12
