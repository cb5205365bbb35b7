"""Sizes of the kernels in Triton. Imports without triton: models are checked, and memory is planned, before loading."""

from __future__ import annotations

MAX_EXPERTS = 1023
MAX_HEAD_DIM = 256
# Of latent attention: the latent that is kept of a token, and its rotated dimensions.
MAX_LATENT_DIM, MAX_ROTATED_DIM = 512, 128
# Elements of a row that is normed. It stays in registers between its read and its write: of the widest row, 32 elements
# in each thread of 32 warps.
MAX_NORMED = 32768
# Tokens of a chunk of decode attention. At 4096 tokens and 8 KV heads one sequence already makes 128 programs; the
# partial results of 4 query heads are 2 KiB beside the 128 KiB of keys and values that a chunk of 128-wide bf16 heads
# reads.
CHUNK_TOKENS = 256
# The merge sees all chunks of a context at once, so longer contexts have longer chunks.
MAX_CHUNKS = 128
