"""Builds a bench checkpoint as transformers saves one: ``python bench/random_mixtral.py full|quick FOLDER``."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from shapes import SEED, SHAPES, Shape

# The router's logits get this standard deviation: with it the top two of eight experts carry about as much weight as in
# a trained Mixtral, and the choice changes from token to token (the bench prints how often).
ROUTER_LOGIT_STD = 1.0
# Embeddings of transformers' default deviation (0.02) drown in what the layers add: greedy decoding then repeats one
# token, whose experts stay resident, and a run from disk reads nothing.
EMBEDDING_STD = 1.0
RECIPE_FILE = "bench_recipe.json"


def ensure_checkpoint(shape: Shape, folder: Path) -> None:
    """Builds the checkpoint in ``folder`` unless it is there; a folder that holds something else is refused."""
    sizes = asdict(shape)
    recipe = {"seed": SEED, "router_logit_std": ROUTER_LOGIT_STD, "embedding_std": EMBEDDING_STD, "shape": sizes}
    made = folder / RECIPE_FILE
    if made.exists() and json.loads(made.read_text()) == recipe:
        return
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something other than this checkpoint: give another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _random_model(shape).save_pretrained(partial)
    _numbers_as_words(shape.vocab).save(str(partial / "tokenizer.json"))
    (partial / RECIPE_FILE).write_text(json.dumps(recipe, indent=2))
    partial.rename(folder)


def _random_model(shape: Shape) -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=ROUTER_LOGIT_STD / shape.hidden**0.5)
    return model


def _numbers_as_words(vocab_size: int) -> Tokenizer:
    """Token 17 is the word "17": every token is text at once, so that a stream has a piece for each."""
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


if __name__ == "__main__":
    ensure_checkpoint(SHAPES[sys.argv[1]], Path(sys.argv[2]))
