"""What a pass reads, against all that a checkpoint holds."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from duoserve.models.opened import opened
from duoserve.planning.formats import layout_in
from duoserve.planning.model_cards import find_model
from duoserve.planning.sizes import layer_sizes, sizes_of
from duoserve.traces.synthetic import CARDS
from tests.models.cases import FAMILIES


def attention_and_router(hidden: int, heads: int, kv_heads: int, head_dim: int, experts: int) -> int:
    """Parameters, with grouped queries."""
    return 2 * hidden * (heads + kv_heads) * head_dim + hidden * experts


# Queries, latents, outputs; keys and values out of latents; the router; two shared experts as one.
DEEPSEEK_V2_LITE = 2048 * (16 * 192 + 576 + 2048) + 512 * 16 * 256 + 2048 * 64 + 3 * 2048 * 2816
# Of one layer, by the makers' papers: an expert's parameters, those of all else, the width of attention scores.
PUBLISHED = {
    "mixtral-8x7b": (3 * 4096 * 14336, attention_and_router(4096, 32, 8, 128, 8), 4096),
    "mixtral-8x22b": (3 * 6144 * 16384, attention_and_router(6144, 48, 8, 128, 8), 6144),
    "qwen3-30b-a3b": (3 * 2048 * 768, attention_and_router(2048, 32, 4, 128, 128), 4096),
    "gpt-oss-120b": (3 * 2880 * 2880, attention_and_router(2880, 64, 8, 64, 128), 4096),
    "gpt-oss-20b": (3 * 2880 * 2880, attention_and_router(2880, 64, 8, 64, 32), 4096),
    "deepseek-v2-lite": (3 * 2048 * 1408, DEEPSEEK_V2_LITE, 16 * 192),
}


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_those_that_were_published(name: str) -> None:
    """Norms and biases are not in these: a thousandth of a layer, but for experts' biases, of which few are read."""
    model, (expert_params, other_params, attention_width) = find_model(name), PUBLISHED[name]
    found = layer_sizes(model, "bf16")
    assert (found.expert_params, found.attention_width) == (expert_params, attention_width)
    beside = [need for name, need in model.family.dense_needs(model.config).items() if ".experts." in name]
    biases = sum(prod(need.shape) for need in beside) // len(model.config.moe_layers)
    assert found.other_params - biases == pytest.approx(other_params, rel=1e-3)
    assert found.expert_bytes == 2 * expert_params


@pytest.mark.parametrize(
    ("name", "form", "megabytes"),
    [
        ("mixtral-8x7b", "int4", 93.6),
        ("mixtral-8x22b", "int4", 160),
        ("qwen3-30b-a3b", "fp8", 4.72),
        ("gpt-oss-120b", None, 13.2),
        ("mixtral-8x7b", None, 352.3),
    ],
)
def test_expert_bytes_are_those_of_the_published_checkpoints(name: str, form: str | None, megabytes: float) -> None:
    assert layer_sizes(find_model(name), form).expert_bytes / 1e6 == pytest.approx(megabytes, rel=0.02)


def test_a_checkpoints_layer_has_its_own_bytes_shared_experts_included(tmp_path: Path) -> None:
    cases = FAMILIES["deepseek_v2"]
    with opened(cases.save(tmp_path, cases.hard)) as found:
        sizes, hidden = layer_sizes(found), found.config.hidden_size
        assert sizes.expert_params == 3 * hidden * 12
        assert sizes.expert_bytes == found.layout(found.config.dtype).slot_bytes
        assert sizes.other_bits == 32
    assert sizes.other_params > 3 * hidden * 2 * 12


def test_every_model_that_routing_is_made_up_for_has_sizes() -> None:
    for name, card in CARDS.items():
        config = find_model(name).config
        assert (config.num_experts, config.top_k, len(config.moe_layers)) == (
            card.num_experts,
            card.top_k,
            card.num_layers,
        )


def test_shared_experts_are_read_by_every_token_and_dense_layers_are_apart() -> None:
    model = find_model("deepseek-v2-lite")
    sizes = sizes_of(model.family, model.config, layout_in(model.config, None, model.config.dtype), model.config.dtype)
    assert sizes.layer.other_params > 3 * 2048 * 2816
    assert sizes.dense_params > 3 * 2048 * 10944
    assert sizes.shape.layers == tuple(range(1, 27))
    assert sizes.kv_bytes == 576 * 2
