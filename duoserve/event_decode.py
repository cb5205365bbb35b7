"""Decode steps without launch overhead: all that lies between two layers' experts is recorded, and replayed as one.

The host learns each router's choice, brings what is missing and replays the experts as they become ready.

B sequences, M pages of the page table, K top-k, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from duoserve.decode_inputs import DecodeInputs, WorkFeed
from duoserve.engine import Decoder
from duoserve.kernels import by_demand
from duoserve.kernels.recorder import Recorder, Recording
from duoserve.kv_cache import Layout, PagedKVCache
from duoserve.models.moe import MoEBlock
from duoserve.models.parts import Choice, first_part, next_part
from duoserve.models.transformer import Transformer

# A shape (sequences, width of the page table) is recorded once it has been computed so often: recording costs as much
# as many steps, and a batch that shrinks passes through shapes that it never comes back to.
RECORD_AFTER = 4
MAX_SHAPES = 8  # recorded at most, for each takes memory


class EventDecoder(Decoder):
    """Computes decode steps by recordings, one for each shape; unrecorded shapes go through the model itself.

    A step is recorded for exactly its number of sequences. A step padded to the next power of two would do with fewer
    recordings, but tiles, and the algorithms of a library's matrix product, are chosen by the number of rows: its bits
    would not be those of the model itself.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedKVCache,
        recorder: Recorder,
        record_after: int = RECORD_AFTER,
        max_shapes: int = MAX_SHAPES,
    ) -> None:
        self._model = model
        self._cache = cache
        self._recorder = recorder
        self._record_after = record_after
        self._max_shapes = max_shapes
        self._seen: Counter[tuple[int, int]] = Counter()
        self._steps: dict[tuple[int, int], EventStep] = {}

    def __call__(self, layout: Layout) -> Tensor:
        """As in Decoder; the logits are those of this step until the next one."""
        step = self._step(len(layout.spans), len(layout.page_table[0]))
        return self._model(self._cache.batch(layout)).cpu() if step is None else step(layout)

    def _step(self, num_sequences: int, table_width: int) -> EventStep | None:
        shape = (num_sequences, table_width)
        self._seen[shape] += 1
        if shape not in self._steps and self._seen[shape] > self._record_after and len(self._steps) < self._max_shapes:
            inputs = DecodeInputs(self._recorder, self._cache, num_sequences, table_width)
            self._steps[shape] = EventStep(self._model, self._recorder, inputs, num_sequences)
        return self._steps.get(shape)


class _Layer(NamedTuple):
    """A recorded part that ends with ``choice``, and the recorded experts of whatever is in the feed."""

    choice: Choice
    part: Recording[Choice | Tensor]
    experts: Recording[None]


class EventStep:
    """A recorded decode step of one shape."""

    def __init__(self, model: Transformer, recorder: Recorder, inputs: DecodeInputs, num_sequences: int) -> None:
        block = next(layer.ffn for layer in model.layers if isinstance(layer.ffn, MoEBlock))
        self._num_experts = len(block.router_EH)
        self._recorder = recorder
        self._inputs = inputs
        self._choice_BK = recorder.host((num_sequences, block.top_k), torch.int64)
        self._logits_BV = recorder.host((num_sequences, len(model.head_VH)), torch.float32)
        self._feed = WorkFeed(recorder, self._num_experts, min(self._num_experts, num_sequences * block.top_k))
        self._layers: list[_Layer] = []
        part = recorder.record(lambda: self._told(first_part(model, inputs.batch())))
        while isinstance(choice := part.result, Choice):
            experts = recorder.record(partial(choice.block.compute, choice.routed, self._feed.work))
            self._layers.append(_Layer(choice, part, experts))
            part = recorder.record(partial(self._next, model, choice))
        self._last = part

    def __call__(self, layout: Layout) -> Tensor:
        """The float32 logits [B, V] on the host, which the next call overwrites."""
        self._inputs.load(layout)
        for layer in self._layers:
            layer.part.replay()
            self._recorder.wait()
            self._compute(layer)
        self._last.replay()
        self._recorder.wait()
        return self._logits_BV

    def _compute(self, layer: _Layer) -> None:
        """The chosen experts of a layer, the resident ones at once, the others behind their copies."""
        self._feed.rewind()
        choice = layer.choice
        counts_E = np.bincount(self._choice_BK.numpy().ravel(), minlength=self._num_experts)
        with choice.block.acquire(choice.routed, by_demand(counts_E.tolist())) as lease:
            for ready in lease:
                self._feed.load(ready)
                layer.experts.replay()

    def _next(self, model: Transformer, choice: Choice) -> Choice | Tensor:
        return self._told(next_part(model, choice))

    def _told(self, end: Choice | Tensor) -> Choice | Tensor:
        """Lets the host know, as part of what is recorded, what a part has come to."""
        if isinstance(end, Choice):
            self._recorder.copy(self._choice_BK, end.routed.topk_ids_TK)
        else:
            self._recorder.copy(self._logits_BV, end)
        return end
