"""The memory of a forward pass on its device beside weights and KV cache, by formula, so that a cap can be kept.

T tokens of the pass, H hidden, I expert intermediate, E experts, K top-k, R = T * K routed rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from duoserve.architecture import AttentionConfig, LatentAttentionConfig
from duoserve.config import ModelConfig
from duoserve.kernels import QUERY_ROWS
from duoserve.kernels.experts_together import WIDTH
from duoserve.kernels.limits import CHUNK_TOKENS, MAX_CHUNKS
from duoserve.kv_cache import PAGE_TOKENS
from duoserve.launching.compiled import SIZES
from duoserve.launching.recorded import MAX_SEQUENCES, MOST_RECORDINGS
from duoserve.models.transformer import LOGIT_ROWS

FLOAT_BYTES = 4
SCORE_BYTES = 24  # for each token and expert: the router's float32 scores, their softmax and their order
ROUTED_ROW_BYTES = 36  # for each routed row: id, weight, and places before and after sorting
# For each expert: the address of its row, and its slot and target in each recording.
TABLE_BYTES = 8 + 2 * MOST_RECORDINGS * 4
MANY_QUERIES = 768  # from so many on, PyTorch's attention on a CPU takes them in larger blocks
MASK_BYTES = 12  # for each query and key: their distance, and whether one sees the other
# For every pass. On a GPU: cuBLAS's workspaces (32 MiB each on Hopper: one of the thread, one of the recordings, and
# one of the first run of what will be recorded) and what the allocator loses to rounding. On a CPU: the block of
# weights that a product widens or decodes at a time, sums of its groups, and small vectors.
FIXED_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}


def workspace_bytes(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, num_tokens: int, *, compiled: bool = False
) -> int:
    """Bytes of the memory plan's workspace: enough for a pass over ``num_tokens`` tokens of one or more sequences.

    ``compiled``: decode steps are compiled, which counts on a CPU only.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        beside = recorded_bytes(config, dtype, num_tokens)
    else:
        beside = threads_bytes(config, dtype, num_tokens, torch.get_num_threads())
        beside += compiled_bytes(config, num_tokens) if compiled else 0
    return FIXED_BYTES[device.type] + beside + PassMemory(config, dtype, on_gpu, num_tokens).peak_bytes


def recorded_bytes(config: ModelConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of recorded decode steps: each layer's choice and results in each recording, logits, tables, and partials.

    A step is counted with as many sequences as the context has pages for, up to MAX_SEQUENCES, the most of a graph.
    """
    num_sequences, num_layers = min(MAX_SEQUENCES, max(1, num_tokens // PAGE_TOKENS)), len(config.moe_layers)
    kept = 3 * config.hidden_size + config.top_k * (config.hidden_size + config.expert_intermediate_size)
    logits = config.vocab_size * (dtype.itemsize + FLOAT_BYTES)
    steps = MOST_RECORDINGS * num_sequences * (num_layers * kept * dtype.itemsize + logits)
    tables = config.num_layers * config.num_experts * TABLE_BYTES
    return steps + tables + partial_bytes(config, num_sequences, num_tokens)


def partial_bytes(config: ModelConfig, num_sequences: int, table_tokens: int) -> int:
    """Bytes that decode attention on a GPU takes between its two kernels, if page tables span ``table_tokens`` tokens.

    For each sequence, head and chunk of the context that is a sum of values, a largest score and a sum of weights.
    Recordings have that in memory of their own, which one layer and one recording after another uses.
    """
    attention = config.blocks.attention
    width = attention.latent_dim if isinstance(attention, LatentAttentionConfig) else attention.head_dim
    num_chunks = min(MAX_CHUNKS, ceil(table_tokens / CHUNK_TOKENS))
    return num_sequences * attention.num_heads * num_chunks * (width + 2) * FLOAT_BYTES


def threads_bytes(config: ModelConfig, dtype: torch.dtype, num_tokens: int, num_threads: int) -> int:
    """Bytes that a CPU's attention takes within itself where it writes no scores out: a block of them for each thread.

    For each block that is float32 scores, their shares in the model's dtype if that is another one, and for each query
    a largest score, a sum and the sum of values. 64 threads take 56 MiB.
    """
    attention = config.blocks.attention
    if isinstance(attention, LatentAttentionConfig):
        if attention.query_dim != attention.value_dim:
            return 0
        width = attention.value_dim
    else:
        width = attention.head_dim
    queries, keys = 256 if num_tokens >= MANY_QUERIES else 64, min(512, num_tokens)
    share_bytes = 0 if dtype is torch.float32 else dtype.itemsize
    return num_threads * queries * (keys * (FLOAT_BYTES + share_bytes) + (width + 2) * FLOAT_BYTES)


def compiled_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Bytes that compiled decode steps keep: the logits of each size, and the attention scores of two parts of a step.

    For each head and token of one sequence that is its score and its share; all else is no larger than a few rows.
    """
    logits = sum(SIZES) * config.vocab_size
    scores = 2 * 2 * config.blocks.attention.num_heads * num_tokens
    return FLOAT_BYTES * (logits + scores)


@dataclass(frozen=True)
class PassMemory:
    """The most bytes that a pass over ``num_tokens`` holds at a time, counted from what each op reads and writes.

    The parts of a layer run one after another, so the largest counts. On a CPU the twins compute in float32, and the
    rows of an expert are copied, which may be all tokens; a GPU's kernels read rows where they lie.
    """

    config: ModelConfig
    dtype: torch.dtype
    on_gpu: bool
    num_tokens: int

    @property
    def peak_bytes(self) -> int:
        """Bytes of the residual before and after a layer's attention, and of the largest part computed beside it."""
        config = self.config
        residual = 4 * self._rows(config.hidden_size) + 4 * FLOAT_BYTES * self.num_tokens * config.blocks.rope.dim
        dense = self._feed_forward(config.blocks.moe.dense_intermediate_size)
        return residual + max(self.norm_bytes, self.attention_bytes, self.experts_bytes, dense, self.logits_bytes)

    @property
    def norm_bytes(self) -> int:
        """The attention's output, its sum with the residual and the normed sum."""
        hidden = self.config.hidden_size
        return 3 * self._rows(hidden) + 2 * self._scratch(hidden)

    @property
    def attention_bytes(self) -> int:
        """Peak bytes of attention, grouped-query or latent."""
        attention = self.config.blocks.attention
        if isinstance(attention, LatentAttentionConfig):
            return self._latent_bytes(attention)
        return self._grouped_bytes(attention)

    def _grouped_bytes(self, attention: AttentionConfig) -> int:
        """Bytes of the projections, and the most of: making them, rotating them, attending, projecting the result."""
        hidden, queries, keys = self.config.hidden_size, attention.width, attention.num_kv_heads * attention.head_dim
        projections = self._rows(queries + 2 * keys)
        copies = projections * ((attention.qk_norm is not None) + (attention.clip is not None))
        rotated = 2 * self._rows(queries + keys) + self._widened(queries + keys) + 2 * self._scratch(queries + keys)
        scores = max(self._scores_bytes(attention, window) for window in set(attention.windows))
        padded = 2 * self._rows(keys) if attention.sinks else 0
        attended = 3 * self._rows(queries) + 2 * self._rows(keys) + padded + scores
        projected = 2 * self._rows(queries) + self._product(queries, hidden)
        made = self._product(hidden, queries + 2 * keys) - projections
        return projections + max(made, copies + rotated, copies + attended, projected)

    def _latent_bytes(self, attention: LatentAttentionConfig) -> int:
        """Bytes of the queries, and the most of: making them, making latents, attending to these, the output."""
        hidden, queries, row = self.config.hidden_size, attention.width, attention.kv.key_dim
        rank, values = attention.query_rank or 0, attention.num_heads * attention.value_dim
        turned = attention.num_heads * attention.rope_dim
        read = attention.num_heads * (attention.nope_dim + attention.value_dim)
        made = 2 * self._rows(rank) + max(self._product(hidden, rank), self._product(rank or hidden, queries))
        latents = 3 * self._rows(row) + self._widened(hidden) + 2 * self._scratch(row)
        rotated = 2 * self._rows(turned) + 3 * self._scratch(turned)
        reading = self._rows(row) + self._product(attention.latent_dim, read)
        attending = self._rows(row + read + queries + values) + self._latent_scores_bytes(attention)
        projected = 2 * self._rows(values) + self._product(values, hidden)
        last = self._rows(queries) + max(reading, attending)
        return self._rows(queries + turned) + max(made, latents + rotated, last, projected)

    @property
    def experts_bytes(self) -> int:
        """Bytes of the routing, of the routed rows' activations and outputs, and of an expert or the sum besides."""
        config = self.config
        hidden, inner = config.hidden_size, config.expert_intermediate_size
        scores = self.num_tokens * config.num_experts * (self.dtype.itemsize + SCORE_BYTES)
        routed = config.top_k * (self._rows(inner) + self._rows(hidden) + self.num_tokens * ROUTED_ROW_BYTES)
        clamped = config.blocks.moe.clamp is not None
        up = self._rows(hidden) + self._product(hidden, 2 * inner) + self._rows(5 * inner if clamped else inner)
        expert = 0 if self.on_gpu else max(up, self._product(inner, hidden), self._together_bytes())
        combined = self._rows(hidden) + 3 * self._scratch(hidden)
        biases = config.top_k * self._rows(hidden) if clamped else 0
        shared = config.blocks.moe.shared
        if shared is None:
            return scores + routed + max(expert, combined, biases)
        kept = self._rows(hidden) * (3 if shared.gated else 1)
        alone = self._feed_forward(shared.intermediate_size)
        return scores + routed + kept + max(alone, expert, combined, biases)

    def _together_bytes(self) -> int:
        """Bytes of a group of experts: rows, products and results, in buffers of a fixed number of rows."""
        if self.dtype is not torch.bfloat16:
            return 0
        width = 4 * self.config.expert_intermediate_size + 3 * self.config.hidden_size
        return WIDTH * width * self.dtype.itemsize

    @property
    def logits_bytes(self) -> int:
        """Bytes of the normed rows, and of a block of logits in the model's dtype and in float32."""
        config, rows = self.config, min(self.num_tokens, LOGIT_ROWS)
        per_logit = FLOAT_BYTES if self.dtype is torch.float32 else self.dtype.itemsize + FLOAT_BYTES
        return 3 * self._rows(config.hidden_size) + rows * config.vocab_size * per_logit

    def _feed_forward(self, inner: int) -> int:
        """Bytes of a dense network of width ``inner``, whose first product is kept to the end; 0 if ``inner`` is 0."""
        if not inner:
            return 0
        hidden, wide = self.config.hidden_size, self._rows(2 * inner)
        up = self._product(hidden, 2 * inner)
        return self._rows(hidden) + max(up, 2 * wide, wide + self._rows(inner) + self._product(inner, hidden))

    def _scores_bytes(self, attention: AttentionConfig, window: int | None) -> int:
        """Bytes that masked attention writes out for a block of queries, as float32 attention on a GPU always does."""
        context, rows = self.num_tokens, min(QUERY_ROWS, self.num_tokens)
        if window is not None and window < context:
            context = min(context, window + rows)
        elif not attention.sinks and not (self.on_gpu and self.dtype is torch.float32):
            return 0
        heads_masked = 1
        if attention.sinks:  # each head then has a mask of its own, of which a GPU's attention makes an aligned copy
            heads_masked = attention.num_heads * (2 if self.on_gpu else 1)
        mask = rows * (context + 1) * (MASK_BYTES + heads_masked * self.dtype.itemsize)
        if not self.on_gpu:
            return mask
        return mask + self._written_out(rows, context, attention.num_heads, attention.head_dim)

    def _latent_scores_bytes(self, attention: LatentAttentionConfig) -> int:
        """As ``_scores_bytes``: values are narrower than keys, so a CPU, and float32 on a GPU, write scores out."""
        if self.on_gpu and self.dtype is not torch.float32:
            return 0
        context, rows = self.num_tokens, min(QUERY_ROWS, self.num_tokens)
        mask = rows * context * (MASK_BYTES + self.dtype.itemsize)
        return mask + self._written_out(rows, context, attention.num_heads, attention.query_dim)

    @staticmethod
    def _written_out(rows: int, context: int, num_heads: int, head_dim: int) -> int:
        """Bytes of float32 scores of a block of queries before and after the softmax, and of their keys and values."""
        return num_heads * FLOAT_BYTES * (4 * rows * context + 2 * context * head_dim)

    def _rows(self, width: int) -> int:
        """Bytes of ``width`` elements for every token."""
        return self.num_tokens * width * self.dtype.itemsize

    def _scratch(self, width: int) -> int:
        """Bytes of ``width`` float32 for every token. Twins in PyTorch need them; kernels keep them in registers."""
        return 0 if self.on_gpu else self.num_tokens * width * FLOAT_BYTES

    def _widened(self, width: int) -> int:
        """Bytes of a float32 copy of ``width`` elements for every token, which a twin makes of half precision."""
        return 0 if self.dtype is torch.float32 else self._scratch(width)

    def _product(self, width_in: int, width_out: int) -> int:
        """Bytes of a product's output, and of float32 copies of input and output if it is computed in these."""
        return self._rows(width_out) + self._widened(width_in) + self._widened(width_out)
