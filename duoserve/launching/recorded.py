"""A runner that records decode steps, one recording for each shape, and replays them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from duoserve.callers import warn_caller
from duoserve.kernels.configs import MEDIUM
from duoserve.kv_cache import NewTokens, PagedKVCache
from duoserve.models.transformer import Transformer
from duoserve.out_of_memory import first_line, is_refusal
from duoserve.passes import DecodeStep, StepRunner

# A shape (sequences, width of the page table) is recorded once it has been computed this often: recording costs as much
# as many steps, and a batch that shrinks passes through shapes that it never comes back to.
RECORD_AFTER = 4
MOST_RECORDINGS = 8  # the most that exist at a time, as each takes memory
MAX_SHAPES = MOST_RECORDINGS - 1  # the most that are kept: one is dropped only after another has been made
# Widths of page tables that are recorded, for contexts of up to 4096 tokens; beyond them a table keeps its own width.
# Columns without a sequence's pages cost a GPU one program for each four of them, which ends at once.
TABLE_WIDTHS = (8, 64)
MAX_SEQUENCES = MEDIUM  # of a step that a GPU records: the memory plan and read-through allow no more

Shape = tuple[int, int]  # sequences of a step, width of its page table
MakeStep = Callable[[int, int], DecodeStep | None]  # makes a step of a shape; None if it cannot be recorded


class Shapes(Protocol):
    """Says which shapes are recorded: a step may have a shape of its own, or be padded to a larger one."""

    def of(self, new_tokens: NewTokens) -> Shape:
        """The shape that the step of ``new_tokens`` is recorded in."""
        ...

    def up_to(self, num_sequences: int) -> Iterable[Shape]:
        """The shapes of all steps of up to ``num_sequences`` sequences; none if they are too many to record ahead."""
        ...


@dataclass(frozen=True)
class ExactShapes(Shapes):
    """Records every step with its own number of sequences, so that its bits are those of the model itself.

    Steps padded to the next power of two would need fewer recordings. But kernels choose tiles, and libraries the
    algorithm of a matrix product, by the number of rows, so padding would change bits. The page table may be wider, up
    to ``num_pages``, which changes none: what is behind a sequence's pages is not read, and attention cuts up to 32768
    tokens at the same places whatever the width.
    """

    num_pages: int

    def of(self, new_tokens: NewTokens) -> Shape:
        width = len(new_tokens.page_table[0])
        return len(new_tokens.spans), min(next((one for one in TABLE_WIDTHS if one >= width), width), self.num_pages)

    def up_to(self, num_sequences: int) -> Iterable[Shape]:
        """No shapes, as the widths of the page tables to come are not known."""
        return ()


class RecordedRunner(StepRunner):
    """Computes decode steps with the recordings that ``make_step`` makes; ``model`` computes those of other shapes.

    A shape is recorded when it has occurred more than ``record_after`` times; at most ``max_shapes`` recordings are
    kept. If memory is refused for a shape, it is not tried again. ``num_recordings`` counts the calls of ``make_step``.
    ``shapes`` are ExactShapes unless named.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        model: Transformer,
        cache: PagedKVCache,
        make_step: MakeStep,
        record_after: int = RECORD_AFTER,
        max_shapes: int = MAX_SHAPES,
        shapes: Shapes | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._make_step = make_step
        self._record_after = record_after
        self._max_shapes = max_shapes
        self._shapes = ExactShapes(cache.num_pages) if shapes is None else shapes
        self._seen: Counter[Shape] = Counter()
        self.num_recordings = 0
        self._steps: dict[Shape, DecodeStep | None] = {}  # the most recently used comes last

    def __call__(self, new_tokens: NewTokens) -> Tensor:
        """As in StepRunner; the next call may overwrite the logits."""
        step = self._step(self._shapes.of(new_tokens))
        return self._model(self._cache.batch(new_tokens)).cpu() if step is None else step(new_tokens)

    def prepare(self, num_sequences: int) -> None:
        for shape in self._shapes.up_to(num_sequences):
            self._record(shape)

    def _step(self, shape: Shape) -> DecodeStep | None:
        self._seen[shape] += 1
        if self._seen[shape] > self._record_after:
            self._record(shape)
        return self._steps.get(shape)

    def _record(self, shape: Shape) -> None:
        """Records the shape, unless that has been tried before.

        If there are too many recordings then, the least recently used is dropped, and its shape is counted anew.
        """
        if shape in self._steps:
            self._steps[shape] = self._steps.pop(shape)
            return
        self.num_recordings += 1
        self._steps[shape] = self._made(shape)
        recorded = [known for known, step in self._steps.items() if step is not None]
        if len(recorded) > self._max_shapes:
            del self._steps[recorded[0]], self._seen[recorded[0]]

    def _made(self, shape: Shape) -> DecodeStep | None:
        """The recorded step. Warns and gives None if there is not enough memory: the model itself takes less."""
        try:
            return self._make_step(*shape)
        except (MemoryError, RuntimeError) as error:
            if not is_refusal(error):
                raise
            why = first_line(error)
        warn_caller(
            f"out of memory while a decode step of {shape[0]} was recorded ({why}): such steps run op by op, more "
            "slowly (lower expert_slots, memory or max_context, and load the model again)"
        )
        return None
