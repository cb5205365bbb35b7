"""What the embedded models are: few wide experts in ``bard``, many narrow ones in ``bard-fine``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bard.expert_rows import NAME as EXPERT_ROWS

# A window shorter than the training context lets the models run past that context.
CONTEXT, WINDOW = 256, 128
_SHARED: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "sliding_window": WINDOW,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "output_router_logits": True,
}


def bard(vocab_size: int) -> PreTrainedModel:
    """8 experts of width 256, top-2, as Mixtral has them; 11.2 M parameters."""
    config = MixtralConfig(
        vocab_size=vocab_size,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        **_SHARED,
    )
    return MixtralForCausalLM(config)


def bard_fine(vocab_size: int) -> PreTrainedModel:
    """64 experts of width 32, top-8, as Qwen3-MoE has them; 11.2 M parameters."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        moe_intermediate_size=32,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        use_sliding_window=True,
        **_SHARED,
    )
    return Qwen3MoeForCausalLM(config)


@dataclass(frozen=True)
class Embedded:
    """``epochs``: passes over the texts that it takes; ``balance``: the weight of the load-balancing loss.

    With 64 experts, that of ``bard`` left a fifth of them to less than 2 % of the tokens, after 175 steps.
    """

    make: Callable[[int], PreTrainedModel]
    epochs: float
    balance: float


MODELS = {"bard": Embedded(bard, epochs=2.5, balance=0.01), "bard-fine": Embedded(bard_fine, epochs=2.0, balance=0.06)}


def fresh(name: str, tokenizer: Tokenizer) -> PreTrainedModel:
    """A model that knows nothing yet, on the experts of ``bard/expert_rows.py``."""
    model = MODELS[name].make(tokenizer.get_vocab_size())
    model.set_experts_implementation(EXPERT_ROWS)
    return model
