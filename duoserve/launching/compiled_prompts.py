"""Prompts on a CPU with small ops that PyTorch's compiler has made. T tokens, H hidden."""

from __future__ import annotations

import torch

from duoserve.kernels.compiled.ops import compiled_ops
from duoserve.kv_cache import PagedKVCache, SequenceKV
from duoserve.models.parts import PartEnd, first_part, next_part
from duoserve.models.transformer import Transformer
from duoserve.models.variants import with_ops


def compiled_prompts(model: Transformer, cache: PagedKVCache) -> Transformer:
    """The same model with compiled ops between its products, for passes over more than one token.

    All ops are compiled here, so that no prompt waits for it. Bits differ slightly from the model's, which rounds in
    between; they are the same under every policy.
    """
    compiled = with_ops(model, compiled_ops())
    _compile_all(compiled, cache)
    return compiled


@torch.inference_mode()
def _compile_all(model: Transformer, cache: PagedKVCache) -> None:
    """Passes two tokens through everything but the chosen experts, whose outputs are left uninitialized."""
    kv = SequenceKV()
    cache.reserve(kv, 2)
    batch = cache.batch(cache.extend([(kv, [0, 0])]))
    end = first_part(model, batch)
    while isinstance(end, PartEnd):
        end = next_part(end)
    cache.release(kv)
