"""The largest sizes that the kernels in Triton take. Imports without triton: models are checked before loading."""

from __future__ import annotations

MAX_EXPERTS = 1023
MAX_HEAD_DIM = 256
# Of latent attention: the latent that is kept of a token, and its rotated dimensions.
MAX_LATENT_DIM, MAX_ROTATED_DIM = 512, 128
# Elements of a row that is normed. It stays in registers between its read and its write: of the widest row, 32 elements
# in each thread of 32 warps.
MAX_NORMED = 32768
