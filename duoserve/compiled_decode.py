"""Decode steps on a CPU that PyTorch's compiler has made: all that lies between two layers' experts is one call.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from duoserve.compiled_experts import Chosen, CompiledExperts
from duoserve.decode_inputs import DecodeInputs
from duoserve.kernels.compiler import CompiledRecording, CpuCompiler
from duoserve.kv_cache import Layout, PagedKVCache
from duoserve.models.parts import Choice, first_part, moe_blocks, next_part
from duoserve.models.transformer import Transformer
from duoserve.passes import DecodeStep
from duoserve.recorded_choices import RecordedChoices
from duoserve.recorded_decode import MakeStep, RecordedDecoder, Shape, Shapes

# Sequences of the steps that are compiled: few sizes, for each takes seconds to compile, and to compute four rows of a
# product takes as long as to compute two, as its time is that of its weights.
SIZES = (1, 4, 16)


def compiled_decoder(model: Transformer, cache: PagedKVCache) -> RecordedDecoder:
    """Decodes in compiled steps of SIZES, the last sequences padding; the model itself computes those of more.

    A step's bits are not quite the model's, since sums are made in another order; they are the same under every policy.
    The step of one sequence is compiled here, others when a service prepares for them or when they first occur, so that
    who generates alone does not wait for them. They are not put off any longer, or bits would depend on how often there
    was such a step.
    """
    steps = compiled_steps(model, cache, CpuCompiler())
    decoder = RecordedDecoder(model, cache, steps, record_after=0, shapes=PaddedShapes(SIZES, cache.num_pages))
    decoder.prepare(1)
    return decoder


@dataclass(frozen=True)
class PaddedShapes(Shapes):
    """The least of ``sizes`` (ascending) that the sequences fit in, and page tables as wide as they can get."""

    sizes: tuple[int, ...]
    width: int

    def of(self, layout: Layout) -> Shape:
        """As in Shapes; of all steps that fit in none the same."""
        fits = (size for size in self.sizes if size >= len(layout.spans))
        return next(fits, self.sizes[-1] + 1), self.width

    def up_to(self, num_sequences: int) -> Iterable[Shape]:
        """As in Shapes."""
        smaller = [size for size in self.sizes if size < num_sequences]
        return [(size, self.width) for size in self.sizes[: len(smaller) + 1]]


def compiled_steps(model: Transformer, cache: PagedKVCache, compiler: CpuCompiler) -> MakeStep:
    """Makes the compiled steps of ``model``, which share the memory of their routed rows."""
    experts = CompiledExperts(compiler, model, SIZES[-1])

    def make(num_sequences: int, table_width: int) -> CompiledStep | None:
        if num_sequences > SIZES[-1]:
            return None
        inputs = DecodeInputs(compiler, cache, num_sequences, table_width)
        return CompiledStep(model, compiler, inputs, experts, num_sequences)

    return make


class _Layer(NamedTuple):
    """A compiled part, the ``choice`` that it ends with, and who is told of it."""

    part: CompiledRecording[Choice | Tensor]
    choice: Choice
    chosen: RecordedChoices


class CompiledStep(DecodeStep):
    """A compiled decode step of up to B sequences."""

    def __init__(
        self,
        model: Transformer,
        compiler: CpuCompiler,
        inputs: DecodeInputs,
        experts: CompiledExperts,
        num_sequences: int,
    ) -> None:
        blocks = moe_blocks(model)
        self._inputs = inputs
        self._experts = experts
        self._rows = experts.rows.first(num_sequences, blocks[0].top_k)
        self._chosen = {block.layer: RecordedChoices(compiler, [block], num_sequences) for block in blocks}
        self._layers: list[_Layer] = []
        experts.call(1)
        part = compiler.record(lambda: self._told(first_part(model, inputs.batch())))
        while isinstance(choice := part.result, Choice):
            self._layers.append(_Layer(part, choice, self._chosen[choice.block.layer]))
            part = compiler.record(partial(self._next, choice))
        self._last, self._logits_BV = part, choice

    def __call__(self, layout: Layout) -> Tensor:
        """The float32 logits [B, V] without padding, which the next call overwrites."""
        self._inputs.load(layout)
        num_sequences = len(layout.spans)
        for layer in self._layers:
            layer.part.replay()
            self._compute(layer, num_sequences)
        self._last.replay()
        return self._logits_BV[:num_sequences]

    def _compute(self, layer: _Layer, num_sequences: int) -> None:
        """The chosen experts of a layer: what is missing is asked for before anybody hears of the choice."""
        chosen = Chosen(layer.chosen.ids_NBK[0, :num_sequences].tolist())
        with layer.choice.block.acquire(chosen.num_rows) as lease:
            if layer.chosen.tell(num_sequences):
                lease.heard()
            for ready in lease:
                self._experts.compute(layer.choice, chosen, ready)

    def _next(self, choice: Choice) -> Choice | Tensor:
        return self._told(next_part(choice))

    def _told(self, end: Choice | Tensor) -> Choice | Tensor:
        if not isinstance(end, Choice):
            return end
        self._chosen[end.block.layer].bring([end.routed])
        return self._rows.holding(end)
