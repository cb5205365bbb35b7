"""Prompts on a CPU whose small ops PyTorch's compiler has made. T tokens, H hidden."""

from __future__ import annotations

import torch

from duoserve.kernels.compiled.ops import compiled_ops
from duoserve.kv_cache import PagedKVCache, SequenceKV
from duoserve.models.parts import PartEnd, first_part, next_part
from duoserve.models.transformer import Transformer
from duoserve.models.variants import with_ops


def compiled_prompts(model: Transformer, cache: PagedKVCache) -> Transformer:
    """The same model with compiled ops between its products, for passes over more than one token.

    All of them are compiled here, so that no prompt waits for it. The bits are not quite the model's, since what it
    rounds in between is not; they are the same under every policy.
    """
    compiled = with_ops(model, compiled_ops())
    _compile_all(compiled, cache)
    return compiled


@torch.inference_mode()
def _compile_all(model: Transformer, cache: PagedKVCache) -> None:
    """Two tokens go through everything but the chosen experts, in whose place is what the memory holds."""
    kv = SequenceKV()
    cache.reserve(kv, 2)
    batch = cache.batch(cache.extend([(kv, [0, 0])]))
    end = first_part(model, batch)
    while isinstance(end, PartEnd):
        end = next_part(end)
    cache.release(kv)
