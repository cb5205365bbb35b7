"""What a forward pass takes on its device beside weights and KV cache: activations by formula, so that a cap is kept.

T tokens of the pass, A outputs of the query, key and value projections, Q of the queries alone, H hidden, I expert
intermediate, E experts, K top-k, N = T * K routed rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duoserve.config import ModelConfig
from duoserve.kernels import QUERY_ROWS
from duoserve.models.transformer import LOGIT_ROWS

FLOAT_BYTES = 4
SCORE_BYTES = 24  # of a token and expert: the router's float32 scores, their softmax and their order
ROUTED_ROW_BYTES = 36  # its id and weight, and its places before and after sorting
MASK_BYTES = 12  # of a query and key: their distance and whether one sees the other
# Whatever the pass. On a GPU: cuBLAS's workspaces (32 MiB each on Hopper, for two streams) and what the allocator loses
# to rounding. On a CPU: the block of weights that `linear` widens at a time, and small vectors.
FIXED_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}


def workspace_bytes(config: ModelConfig, dtype: torch.dtype, device: torch.device, num_tokens: int) -> int:
    """The workspace of the memory plan: enough for a pass over ``num_tokens`` tokens of one or more sequences."""
    return FIXED_BYTES[device.type] + PassMemory(config, dtype, device.type == "cuda", num_tokens).peak_bytes


@dataclass(frozen=True)
class PassMemory:
    """The most bytes that a pass over ``num_tokens`` holds at a time, counted from what each op reads and writes.

    The layer's parts take turns, so the largest counts. On a CPU the twins compute in float32 and all tokens may take
    one expert, whose rows are then copied; a GPU's kernels read rows where they lie.
    """

    config: ModelConfig
    dtype: torch.dtype
    on_gpu: bool
    num_tokens: int

    @property
    def peak_bytes(self) -> int:
        """Of the residual in its two parts, before and after a layer's attention, and the part that is computed."""
        residual = 4 * self._rows(self.config.hidden_size) + 4 * FLOAT_BYTES * self.num_tokens * self.config.head_dim
        return residual + max(self.norm_bytes, self.attention_bytes, self.experts_bytes, self.logits_bytes)

    @property
    def norm_bytes(self) -> int:
        """The attention's output, its sum with the residual and the normed sum."""
        hidden = self.config.hidden_size
        return 3 * self._rows(hidden) + 2 * self._scratch(hidden)

    @property
    def attention_bytes(self) -> int:
        """The projections, and the largest of: making them, rotating them, attending, projecting what that gives."""
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        projections = self._rows(queries + 2 * keys)
        rotated = 2 * self._rows(queries + keys) + self._widened(queries + keys) + 2 * self._scratch(queries + keys)
        attended = 3 * self._rows(queries) + 2 * self._rows(keys) + self._scores_bytes
        projected = 2 * self._rows(queries) + self._product(queries, config.hidden_size)
        made = self._product(config.hidden_size, queries + 2 * keys) - projections
        return projections + max(made, rotated, attended, projected)

    @property
    def experts_bytes(self) -> int:
        """The routing, each routed row's activations and output, and what one expert or the sum needs besides."""
        config = self.config
        hidden, inner = config.hidden_size, config.expert_intermediate_size
        scores = self.num_tokens * config.num_experts * (self.dtype.itemsize + SCORE_BYTES)
        routed = config.top_k * (self._rows(inner) + self._rows(hidden) + self.num_tokens * ROUTED_ROW_BYTES)
        up = self._rows(hidden) + self._product(hidden, 2 * inner) + self._rows(inner)
        expert = 0 if self.on_gpu else max(up, self._product(inner, hidden))
        combined = self._rows(hidden) + 3 * self._scratch(hidden)
        return scores + routed + max(expert, combined)

    @property
    def logits_bytes(self) -> int:
        """Normed rows, and a block of logits in the model's dtype and in float32."""
        config, rows = self.config, min(self.num_tokens, LOGIT_ROWS)
        per_logit = FLOAT_BYTES if self.dtype is torch.float32 else self.dtype.itemsize + FLOAT_BYTES
        return 3 * self._rows(config.hidden_size) + rows * config.vocab_size * per_logit

    @property
    def _scores_bytes(self) -> int:
        """What masked attention writes out for a block of queries, and so does all attention in float32 on a GPU."""
        config, context = self.config, self.num_tokens
        rows, window = min(QUERY_ROWS, context), config.sliding_window
        if window is not None and window < context:
            context = min(context, window + rows)
        elif not (self.on_gpu and self.dtype is torch.float32):
            return 0
        mask = rows * context * (MASK_BYTES + self.dtype.itemsize)
        if not self.on_gpu:
            return mask
        scores = 4 * rows * context * config.num_heads * FLOAT_BYTES
        return mask + scores + 2 * context * config.num_heads * config.head_dim * FLOAT_BYTES

    def _rows(self, width: int) -> int:
        """``width`` elements for every token."""
        return self.num_tokens * width * self.dtype.itemsize

    def _scratch(self, width: int) -> int:
        """``width`` float32 for every token, where the op is a twin in PyTorch: kernels keep them in registers."""
        return 0 if self.on_gpu else self.num_tokens * width * FLOAT_BYTES

    def _widened(self, width: int) -> int:
        """A float32 copy of ``width`` elements for every token, which a twin makes of what is in half precision."""
        return 0 if self.dtype is torch.float32 else self._scratch(width)

    def _product(self, width_in: int, width_out: int) -> int:
        """A product's output, beside its float32 operands where it is made of these."""
        return self._rows(width_out) + self._widened(width_in) + self._widened(width_out)
