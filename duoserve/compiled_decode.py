"""Decode steps on a CPU that PyTorch's compiler has made: all that lies between two layers' experts is one call.

B sequences, K top-k, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.decode_inputs import DecodeInputs
from duoserve.kernels import HostWork, by_demand, route_plan
from duoserve.kernels.compiler import CompiledRecording, CpuCompiler
from duoserve.kernels.token_expert import knows, token_expert
from duoserve.kv_cache import Layout, PagedKVCache
from duoserve.models.parts import Choice, first_part, next_part
from duoserve.models.transformer import Transformer
from duoserve.passes import Decoder


class CompiledDecoder(Decoder):
    """Compiled steps for one sequence; the model itself computes those of several.

    A step's bits are not quite the model's, since sums are made in another order; they are the same under every policy.
    """

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self._model = model
        self._cache = cache
        self._step = CompiledStep(model, cache, CpuCompiler())

    def __call__(self, layout: Layout) -> Tensor:
        """As in Decoder; the logits are those of this step until the next one."""
        if len(layout.spans) > 1:
            return self._model(self._cache.batch(layout))
        return self._step(layout)


class _Layer(NamedTuple):
    """A compiled part, the ``choice`` that it ends with, and what computes the experts that were chosen."""

    part: CompiledRecording[Choice | Tensor]
    choice: Choice
    experts: Callable[[Choice], None]


class CompiledStep(Decoder):
    """A compiled decode step of one sequence."""

    def __init__(self, model: Transformer, cache: PagedKVCache, compiler: CpuCompiler) -> None:
        self._inputs = DecodeInputs(compiler, cache, 1, cache.num_pages)
        self._num_pages = cache.num_pages
        self._layers: list[_Layer] = []
        part = compiler.record(lambda: first_part(model, self._inputs.batch()))
        while isinstance(choice := part.result, Choice):
            self._layers.append(_Layer(part, choice, _experts(choice, compiler)))
            part = compiler.record(partial(next_part, choice))
        self._last, self._logits_1V = part, choice

    def __call__(self, layout: Layout) -> Tensor:
        """The float32 logits [1, V], which the next call overwrites."""
        [pages] = layout.page_table
        self._inputs.load(layout._replace(page_table=[[*pages, *[-1] * (self._num_pages - len(pages))]]))
        for part, choice, experts in self._layers:
            part.replay()
            experts(choice)
        self._last.replay()
        return self._logits_1V


def _experts(choice: Choice, compiler: CpuCompiler) -> Callable[[Choice], None]:
    compiled = knows(choice.block.weights) and choice.block.clamped is None
    return _CompiledExperts(choice, compiler) if compiled else _experts_by_ops


class _CompiledExperts:
    """The experts of the only token, one compiled call each."""

    def __init__(self, choice: Choice, compiler: CpuCompiler) -> None:
        routed = choice.routed
        self._slot_1, self._place_1 = (compiler.host((1,), torch.int64) for _ in range(2))
        operands = routed.x_TH, choice.block.weights, self._slot_1, self._place_1, routed.y_NH
        self._expert = compiler.record(partial(token_expert, *operands))

    def __call__(self, choice: Choice) -> None:
        [experts] = choice.routed.topk_ids_TK.tolist()
        with choice.block.acquire(choice.routed, by_demand(Counter(experts))) as lease:
            for expert, slot in chain.from_iterable(lease):
                self._slot_1.fill_(slot)
                self._place_1.fill_(experts.index(expert))
                self._expert.replay()


def _experts_by_ops(choice: Choice) -> None:
    """The experts as the model itself computes them."""
    block, routed = choice.block, choice.routed
    plan = route_plan(routed.topk_ids_TK, torch.full((block.num_experts,), -1, dtype=torch.int32))
    planned = routed._replace(plan=plan)
    with block.acquire(planned, plan.by_demand()) as lease:
        for ready in lease:
            block.compute(planned, HostWork.of(ready))
