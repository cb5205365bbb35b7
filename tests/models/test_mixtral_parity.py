"""Mixtral against transformers' MixtralForCausalLM on checkpoints that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from duoserve import MoEModel
from duoserve.models.opened import opened
from tests.helpers.checkpoints import BARD, reference_greedy, reference_logits, save_mixtral, to_hub_dialect
from tests.helpers.small_tokenizers import byte_level_tokenizer
from tests.helpers.toys import greedy, toy_prompt

PROMPT = toy_prompt(40)

CASES = {
    "plain": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "own_head_dim": {"head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 3},
    "tied": {"tie_word_embeddings": True},
    "sliding_window": {"sliding_window": 9},
    "window_longer_than_prompt": {"sliding_window": 64},
    "hub_dialect": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-6},
    "many_shards": {"shard": "20KB", "num_local_experts": 5, "num_experts_per_tok": 3},
    "top_1_odd_width": {"num_experts_per_tok": 1, "intermediate_size": 11},
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_mixtral(tmp_path_factory.mktemp(request.param), **CASES[request.param])
    return to_hub_dialect(made) if request.param == "hub_dialect" else made


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.dtype == torch.float32 and ours.isfinite().all()
    return ((ours - theirs).norm() / theirs.norm()).item()


def check_reference(folder: Path, prompt: list[int], tokens: list[int], logits_TV: torch.Tensor) -> None:
    """Transformers has these logits behind ``prompt + tokens``, by which it chooses the same tokens greedily."""
    true_TV = reference_logits(folder, prompt + tokens)
    assert relative_error(logits_TV, true_TV) <= 1e-5
    assert true_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_logits_and_greedy_tokens_equal_those_of_transformers(folder: Path) -> None:
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        tokens = model.generate(PROMPT, greedy(64)).token_ids
        check_reference(folder, PROMPT, tokens, model.forward(PROMPT + tokens))
    assert len(tokens) == 64


def test_decode_gives_the_logits_of_prefill(folder: Path) -> None:
    """Teacher forcing: the greedy token after every prefix is the argmax of that prefix's last logits."""
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        out = model.generate(PROMPT[:5], greedy(20))
        logits_TV = model.forward(PROMPT[:5] + out.token_ids[:-1])
    assert logits_TV[4:].argmax(-1).tolist() == out.token_ids


def test_a_head_of_its_own_beats_a_config_that_calls_it_tied(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with MoEModel.from_pretrained(folder, dtype="float32") as model:
        assert relative_error(model.forward(PROMPT), reference_logits(folder, PROMPT)) <= 1e-5


@pytest.mark.parametrize("end_tokens", [[5, 6], 5, [], None])
def test_end_tokens_are_those_of_transformers(end_tokens: list[int] | int | None, tmp_path: Path) -> None:
    """Those of generation_config.json, which no others join, not even the tokenizer's; without it config.json's."""
    folder = save_mixtral(tmp_path / "model", eos_token_id=1, vocab_size=291)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    if end_tokens is None:
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_tokens}))
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    with opened(folder) as found:
        assert list(found.config.eos_token_ids) == (theirs if isinstance(theirs, list) else [theirs])


def test_bard_equals_transformers() -> None:
    prompt = [0, *((37 * i) % 2000 + 2 for i in range(300))]
    with MoEModel.from_pretrained("bard", dtype="float32", max_context=1024) as model:
        assert relative_error(model.forward(prompt), reference_logits(BARD, prompt)) <= 1e-5
        out = model.generate(prompt[:20], greedy(64))
    assert out.token_ids == reference_greedy(BARD, prompt[:20], 64)
