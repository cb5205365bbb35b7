"""The sizes of the Mixtrals that the benches run, of the request that they run on them, and the arithmetic of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duoserve.experts.layout import ExpertLayout, Quantized
from duoserve.kernels import ExpertFormat
from duoserve.kv_cache import PagedKVCache

SEED = 20250907
ITEM_BYTES = 2  # bf16
TRAINING_PROMPTS = 12
RUNTIME_BYTES = 100_000_000  # what an engine may take beside the model where memory is limited


@dataclass(frozen=True)
class Shape:
    """A Mixtral's sizes in elements, and the request that is measured on it in tokens."""

    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocab: int
    prompt_tokens: int
    new_tokens: int

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return self.layers * self.experts

    @property
    def quarter(self) -> int:
        """A quarter of all experts, in slots."""
        return self.num_experts // 4

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's three matrices."""
        return 3 * self.hidden * self.intermediate * ITEM_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: an expert, padded as direct I/O wants it."""
        return ExpertLayout(torch.bfloat16, self.hidden, self.intermediate).slot_bytes

    @property
    def bf12_slot_bytes(self) -> int:
        """The same of an expert in BF12."""
        return ExpertLayout(Quantized(ExpertFormat.BF12), self.hidden, self.intermediate).slot_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything that is not an expert."""
        head_dim = self.hidden // self.heads
        attention = self.hidden * head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 2 * self.hidden + self.experts * self.hidden
        return (self.layers * layer + self.hidden + 2 * self.vocab * self.hidden) * ITEM_BYTES

    @property
    def max_context(self) -> int:
        """Tokens of context that an engine is loaded for: the request, in whole pages of the KV cache."""
        return PagedKVCache.whole_pages(self.prompt_tokens + self.new_tokens)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of ``max_context`` tokens."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * self.max_context * ITEM_BYTES

    @property
    def cap_bytes(self) -> int:
        """The limit of memory for engines that may hold a quarter of the experts, and all else."""
        return self.quarter * self.slot_bytes + self.dense_bytes + self.kv_bytes + RUNTIME_BYTES

    @property
    def prefill_flop(self) -> int:
        """Floating-point operations of the prompt's matrix products; attention's scores, some 1 %, are left out."""
        per_token = (self.dense_bytes // ITEM_BYTES - 2 * self.vocab * self.hidden) + (
            self.layers * self.top_k * self.expert_bytes // ITEM_BYTES
        )
        return 2 * (self.prompt_tokens * per_token + self.vocab * self.hidden)

    @property
    def active_bytes(self) -> int:
        """Weight bytes that one decoded token needs: its experts and all dense ones but the embedding table."""
        dense = self.dense_bytes - self.vocab * self.hidden * ITEM_BYTES
        return self.layers * self.top_k * self.expert_bytes + dense

    def prompt(self) -> list[int]:
        """The prompt's token ids, the same in every run."""
        return self._random_prompts(SEED, 1)[0]

    def training_prompts(self) -> list[list[int]]:
        """Other prompts, for a predictor to be trained on."""
        return self._random_prompts(SEED + 1, TRAINING_PROMPTS)

    def _random_prompts(self, seed: int, count: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.vocab, (count, self.prompt_tokens), generator=generator).tolist()


# 288 M parameters, 226 M of them in experts: more than a cache holds, little enough to be built in seconds.
FULL = Shape(768, 1536, 8, 8, 2, 12, 4, 32000, prompt_tokens=128, new_tokens=32)
QUICK = Shape(128, 256, 4, 8, 2, 4, 2, 512, prompt_tokens=32, new_tokens=8)
SHAPES = {"full": FULL, "quick": QUICK}
