"""A Mixtral checkpoint as GGUF: ``PYTHONPATH=bench python -m cpu.gguf_mixtral bf16|q8_0|q4_0 CHECKPOINT OUT.gguf``.

The names, the merged experts and the order of the rows are those that llama.cpp's architecture "llama" reads. In q8_0
every matrix is quantized but the routers, as llama.cpp's own tool does, and in q4_0 too, where that tool would leave
the output in more bits; norms are float32 always.

E experts, H hidden, I expert intermediate, N output features.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cpu.gguf_file import Entry, Kind, Value, write

FILE_TYPES = {Kind.BF16: 32, Kind.Q8_0: 7, Kind.Q4_0: 2}  # llama.cpp's numbers for files that are mostly of one kind
NORMAL_TOKEN = 1  # of all tokens, special ones too: every token must have text, or a stream has no piece for it


def convert(checkpoint: Path, out: Path, kind: Kind) -> None:
    """Writes ``out`` unless it is there; a conversion that was cut short leaves no file of that name."""
    if out.exists():
        return
    config = json.loads((checkpoint / "config.json").read_text())
    partial = out.with_suffix(".partial")
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        write(partial, metadata(config, kind), list(entries(config, tensors, kind)))
    partial.rename(out)


def metadata(config: dict[str, Any], kind: Kind) -> dict[str, Value]:
    """What llama.cpp asks of a Mixtral, and a vocabulary of numbers, of which only the ids are ever used."""
    vocab = range(config["vocab_size"])
    hidden, heads, kv_heads, head_size = _sizes(config)
    return {
        "general.architecture": "llama",
        "general.name": "random Mixtral",
        "general.file_type": FILE_TYPES[kind],
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": hidden,
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.rope.dimension_count": head_size,
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.expert_count": config["num_local_experts"],
        "llama.expert_used_count": config["num_experts_per_tok"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"\N{LOWER ONE EIGHTH BLOCK}{token}" for token in vocab],
        "tokenizer.ggml.scores": [0.0 for _ in vocab],
        "tokenizer.ggml.token_type": [NORMAL_TOKEN for _ in vocab],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def entries(config: dict[str, Any], tensors: Any, kind: Kind) -> Iterator[Entry]:
    """All tensors, layer by layer."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]

    def plain(name: str, source: str, shape: tuple[int, ...], stored: Kind) -> Entry:
        return Entry(f"{name}.weight", shape, stored, lambda: tensors.get_tensor(f"{source}.weight"))

    yield plain("token_embd", "model.embed_tokens", (vocab, hidden), kind)
    for layer in range(config["num_hidden_layers"]):
        block, source = f"blk.{layer}", f"model.layers.{layer}"
        yield plain(f"{block}.attn_norm", f"{source}.input_layernorm", (hidden,), Kind.F32)
        yield from _attention(config, tensors, kind, layer)
        yield plain(f"{block}.ffn_norm", f"{source}.post_attention_layernorm", (hidden,), Kind.F32)
        router = (config["num_local_experts"], hidden)
        yield plain(f"{block}.ffn_gate_inp", f"{source}.block_sparse_moe.gate", router, Kind.F32)
        yield from _experts(config, tensors, kind, layer)
    yield plain("output_norm", "model.norm", (hidden,), Kind.F32)
    yield plain("output", "lm_head", (vocab, hidden), kind)


def _attention(config: dict[str, Any], tensors: Any, kind: Kind, layer: int) -> Iterator[Entry]:
    hidden, heads, kv_heads, head_size = _sizes(config)
    source = f"model.layers.{layer}.self_attn"

    def projection(name: str, letter: str, shape: tuple[int, int], rotated_heads: int = 0) -> Entry:
        def read() -> Tensor:
            weights_NH: Tensor = tensors.get_tensor(f"{source}.{letter}_proj.weight")
            return pairs_together(weights_NH, rotated_heads) if rotated_heads else weights_NH

        return Entry(f"blk.{layer}.{name}.weight", shape, kind, read)

    yield projection("attn_q", "q", (heads * head_size, hidden), heads)
    yield projection("attn_k", "k", (kv_heads * head_size, hidden), kv_heads)
    yield projection("attn_v", "v", (kv_heads * head_size, hidden))
    yield projection("attn_output", "o", (hidden, heads * head_size))


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Hidden, heads, heads of keys and values, and what a head has."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return hidden, heads, config["num_key_value_heads"], hidden // heads


def pairs_together(weights_NH: Tensor, heads: int) -> Tensor:
    """Rows in the order in which llama.cpp rotates them: it pairs neighbours, transformers pairs halves of a head."""
    return weights_NH.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _experts(config: dict[str, Any], tensors: Any, kind: Kind, layer: int) -> Iterator[Entry]:
    experts, hidden, width = (config[name] for name in ("num_local_experts", "hidden_size", "intermediate_size"))
    source = f"model.layers.{layer}.block_sparse_moe.experts"

    def merged(name: str, part: str, shape: tuple[int, int]) -> Entry:
        def read() -> Tensor:
            return torch.stack([tensors.get_tensor(f"{source}.{e}.{part}.weight") for e in range(experts)])

        return Entry(f"blk.{layer}.{name}.weight", (experts, *shape), kind, read)

    yield merged("ffn_gate_exps", "w1", (width, hidden))
    yield merged("ffn_down_exps", "w2", (hidden, width))
    yield merged("ffn_up_exps", "w3", (width, hidden))


if __name__ == "__main__":
    convert(Path(sys.argv[2]), Path(sys.argv[3]), Kind[sys.argv[1].upper()])
