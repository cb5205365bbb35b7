"""Decode steps on a CPU that PyTorch's compiler has made: all that lies between two layers' experts is one call.

B sequences, K top-k, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.decode_inputs import DecodeInputs
from duoserve.kernels import HostWork, route_plan
from duoserve.kernels.compiler import CompiledRecording, CpuCompiler
from duoserve.kernels.token_expert import knows, token_expert
from duoserve.kv_cache import Layout, PagedKVCache
from duoserve.models.parts import Choice, first_part, moe_blocks, next_part
from duoserve.models.transformer import Transformer
from duoserve.passes import Decoder
from duoserve.recorded_choices import RecordedChoices
from duoserve.scheduling.source import ReadyExpert

# Computes some of a token's chosen experts, which are listed in the router's order, from the slots that they are in.
Experts = Callable[[Sequence[int], Iterable[ReadyExpert]], None]


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
    """A compiled part, the ``choice`` that it ends with and who is told of it, and what computes chosen experts."""

    part: CompiledRecording[Choice | Tensor]
    choice: Choice
    chosen: RecordedChoices
    experts: Experts


class CompiledStep(Decoder):
    """A compiled decode step of one sequence."""

    def __init__(self, model: Transformer, cache: PagedKVCache, compiler: CpuCompiler) -> None:
        self._inputs = DecodeInputs(compiler, cache, 1, cache.num_pages)
        self._num_pages = cache.num_pages
        self._chosen = {block.layer: RecordedChoices(compiler, [block], 1) for block in moe_blocks(model)}
        self._layers: list[_Layer] = []
        part = compiler.record(lambda: self._told(first_part(model, self._inputs.batch())))
        while isinstance(choice := part.result, Choice):
            self._layers.append(_Layer(part, choice, self._chosen[choice.block.layer], _experts(choice, compiler)))
            part = compiler.record(partial(self._next, choice))
        self._last, self._logits_1V = part, choice

    def __call__(self, layout: Layout) -> Tensor:
        """The float32 logits [1, V], which the next call overwrites."""
        [pages] = layout.page_table
        self._inputs.load(layout._replace(page_table=[[*pages, *[-1] * (self._num_pages - len(pages))]]))
        for layer in self._layers:
            layer.part.replay()
            self._compute(layer)
        self._last.replay()
        return self._logits_1V

    def _compute(self, layer: _Layer) -> None:
        """The chosen experts of a layer: what is missing is asked for before anybody hears of the choice."""
        experts: list[int] = layer.chosen.ids_NBK.flatten().tolist()
        with layer.choice.block.acquire(Counter(experts)) as lease:
            if layer.chosen.tell():
                lease.heard()
            for ready in lease:
                layer.experts(experts, ready)

    def _next(self, choice: Choice) -> Choice | Tensor:
        return self._told(next_part(choice))

    def _told(self, end: Choice | Tensor) -> Choice | Tensor:
        if isinstance(end, Choice):
            self._chosen[end.block.layer].bring([end.routed])
        return end


def _experts(choice: Choice, compiler: CpuCompiler) -> Experts:
    compiled = knows(choice.block.weights) and choice.block.clamped is None
    return _CompiledExperts(choice, compiler) if compiled else partial(_experts_by_ops, choice)


class _CompiledExperts:
    """The experts of the only token, one compiled call each."""

    def __init__(self, choice: Choice, compiler: CpuCompiler) -> None:
        routed = choice.routed
        self._slot_1, self._place_1 = (compiler.host((1,), torch.int64) for _ in range(2))
        operands = routed.x_TH, choice.block.weights, self._slot_1, self._place_1, routed.y_NH
        self._expert = compiler.record(partial(token_expert, *operands))

    def __call__(self, experts: Sequence[int], ready: Iterable[ReadyExpert]) -> None:
        for expert, slot in ready:
            self._slot_1.fill_(slot)
            self._place_1.fill_(experts.index(expert))
            self._expert.replay()


def _experts_by_ops(choice: Choice, experts: Sequence[int], ready: Iterable[ReadyExpert]) -> None:
    """The experts as the model itself computes them."""
    block, routed = choice.block, choice.routed
    plan = route_plan(torch.tensor([experts]), torch.full((block.num_experts,), -1, dtype=torch.int32))
    block.compute(routed._replace(plan=plan), HostWork.of(ready))
