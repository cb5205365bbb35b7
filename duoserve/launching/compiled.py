"""Decode steps on a CPU that PyTorch's compiler has made: all that lies between the experts of two layers is one call.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from duoserve.callers import warn_caller
from duoserve.errors import CompilerError
from duoserve.kernels.compiled.compiler import CompiledRecording, CpuCompiler
from duoserve.kv_cache import NewTokens, PagedKVCache, pages_for
from duoserve.launching.compiled_experts import Chosen, CompiledExperts
from duoserve.launching.inputs import DecodeInputs
from duoserve.launching.recorded import MakeStep, RecordedRunner, Shape, Shapes
from duoserve.launching.recorded_choices import RecordedChoices
from duoserve.models.parts import PartEnd, first_part, moe_blocks, next_part
from duoserve.models.transformer import Transformer
from duoserve.passes import DecodeStep

# The numbers of sequences that steps are compiled for. They are few, as each takes seconds to compile, and a product of
# four rows takes as long as one of two: reading the weights determines the time.
SIZES = (1, 4, 16)
# Pages of a short context: 4096 tokens. Attention of one sequence is loops over its pages, and how their sums are made
# must not depend on the number of pages.
SHORT = 64
_BY_OPS = "such steps run op by op, more slowly, and round other numbers"


def compiled_runner(model: Transformer, cache: PagedKVCache, sizes: tuple[int, ...] = SIZES) -> RecordedRunner:
    """Decodes in compiled steps of ``sizes``, filled up with padding; the model itself computes larger steps.

    A step's bits are not quite the model's, as sums are made in another order; they are the same under every policy.
    The step of one sequence is compiled here. Others are compiled when a service prepares for them, or when they first
    occur, so that a single request does not wait for them. They are not put off further, or bits would depend on how
    many such steps there have been.
    """
    steps = compiled_steps(model, cache, CpuCompiler(taped=True), sizes[-1])
    runner = RecordedRunner(model, cache, steps, record_after=0, shapes=PaddedShapes(sizes, cache.num_pages))
    runner.prepare(1)
    return runner


@dataclass(frozen=True)
class PaddedShapes(Shapes):
    """Shapes padded to the least of ``sizes`` (ascending) that holds the sequences, with the widest page table.

    A short context of one sequence has a step of its own.
    """

    sizes: tuple[int, ...]
    width: int

    def of(self, new_tokens: NewTokens) -> Shape:
        """As in Shapes; all steps that are larger than any size have the same shape."""
        size = next((size for size in self.sizes if size >= len(new_tokens.spans)), self.sizes[-1] + 1)
        is_short = size == 1 and pages_for(new_tokens.lengths[0]) <= SHORT
        return size, min(self.width, SHORT) if is_short else self.width

    def up_to(self, num_sequences: int) -> Iterable[Shape]:
        """As in Shapes, without the step for a long context of one sequence, which few need."""
        smaller = [size for size in self.sizes if size < num_sequences]
        return [(size, min(self.width, SHORT) if size == 1 else self.width) for size in self.sizes[: len(smaller) + 1]]


def compiled_steps(model: Transformer, cache: PagedKVCache, compiler: CpuCompiler, most: int) -> MakeStep:
    """A maker of compiled steps of up to ``most`` sequences, which share the memory of their routed rows.

    It warns and gives None if a step cannot be compiled when it is wanted: requests then go on op by op.
    """
    experts = CompiledExperts(compiler, model, most)

    def make(num_sequences: int, table_width: int) -> CompiledStep | None:
        if num_sequences > most:
            return None
        inputs = DecodeInputs(compiler, cache, num_sequences, table_width)
        try:
            return CompiledStep(model, compiler, inputs, experts)
        except CompilerError as error:
            warn_caller(f"a decode step of {num_sequences} could not be compiled ({error}): {_BY_OPS}")
            return None

    return make


def _widths(num_sequences: int, widest: int) -> range:
    """The widths of page tables that a step reads. One sequence has as many pages as it needs, at least two."""
    if num_sequences > 1 or widest < 2:
        return range(widest, widest + 1)
    return range(2 if widest <= SHORT else SHORT + 1, widest + 1)


class _Layer(NamedTuple):
    """A compiled part, the ``end`` that it comes to, and its routers' choice, for listeners."""

    part: CompiledRecording[PartEnd | Tensor]
    end: PartEnd
    chosen: RecordedChoices


class CompiledStep(DecodeStep):
    """A compiled decode step of up to B sequences."""

    def __init__(
        self, model: Transformer, compiler: CpuCompiler, inputs: DecodeInputs, experts: CompiledExperts
    ) -> None:
        blocks = moe_blocks(model)
        num_sequences, widest = inputs.shape
        self.widths = _widths(num_sequences, widest)
        self._inputs = inputs
        self._experts = experts
        self._rows = experts.rows.first(num_sequences, blocks[0].top_k)
        self._chosen = {block.layer: RecordedChoices(compiler, [block], num_sequences) for block in blocks}
        self._layers: list[_Layer] = []
        experts.prepare(num_sequences)
        part = compiler.record_for(partial(self._first, model), self.widths)
        while isinstance(end := part.result, PartEnd):
            self._layers.append(_Layer(part, end, self._chosen[end.block.layer]))
            part = compiler.record_for(partial(self._next, end), self.widths)
        self._last, self._logits_BV = part, end

    def __call__(self, new_tokens: NewTokens) -> Tensor:
        """The float32 logits [B, V] without padding, which the next call overwrites."""
        self._inputs.load(new_tokens)
        num_sequences, width = len(new_tokens.spans), max(self.widths[0], pages_for(max(new_tokens.lengths)))
        for layer in self._layers:
            layer.part.replay(width)
            self._compute(layer, num_sequences)
        self._last.replay(width)
        return self._logits_BV[:num_sequences]

    def _compute(self, layer: _Layer, num_sequences: int) -> None:
        """Computes the chosen experts of a layer. Missing experts are asked for before listeners hear of the choice."""
        chosen = Chosen(layer.chosen.ids_NBK[0, :num_sequences].tolist())
        with layer.end.block.acquire(chosen.num_rows) as lease:
            if layer.chosen.report(num_sequences):
                lease.prefetch()
            for ready in lease:
                self._experts.compute(layer.end, chosen, ready)

    def _first(self, model: Transformer, width: int) -> PartEnd | Tensor:
        return self._with_outputs(first_part(model, self._inputs.batch(width)))

    def _next(self, end: PartEnd, width: int) -> PartEnd | Tensor:
        batch = replace(end.frame.batch, kv=self._inputs.kv(width))
        return self._with_outputs(next_part(end._replace(frame=end.frame._replace(batch=batch))))

    def _with_outputs(self, end: PartEnd | Tensor) -> PartEnd | Tensor:
        if not isinstance(end, PartEnd):
            return end
        self._chosen[end.block.layer].bring([end.routed])
        return self._rows.holding(end)
