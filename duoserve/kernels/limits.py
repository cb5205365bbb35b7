"""The largest sizes that the kernels in Triton take. Imports without triton: a model is asked before it is loaded."""

from __future__ import annotations

MAX_EXPERTS = 1023
MAX_HEAD_DIM = 256
# Of latent attention: what is kept of a token, and its rotated dimensions.
MAX_LATENT_DIM, MAX_ROTATED_DIM = 512, 128
# Elements of a row that is normed, which stays in registers from its one read to its write: 16 warps hold 64 of the
# widest row in each thread.
MAX_NORMED = 32768
