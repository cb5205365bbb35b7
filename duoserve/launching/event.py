"""Decode steps in recorded parts: all that lies between two layers' experts is one recording, replayed in one launch.

After each part the host reads the router's choice, asks for the missing experts, and replays the experts as they become
ready. Only then are listeners told of the routing, so that no copy and no resident expert waits for a predictor.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from duoserve.kernels.recorder import Recorder, Recording
from duoserve.kv_cache import NewTokens, PagedKVCache
from duoserve.launching.inputs import DecodeInputs, WorkFeed
from duoserve.launching.recorded import MAX_SEQUENCES, MakeStep
from duoserve.launching.recorded_choices import RecordedChoices
from duoserve.models.parts import PartEnd, first_part, moe_blocks, next_part
from duoserve.models.transformer import Transformer
from duoserve.passes import DecodeStep
from duoserve.scheduling.source import ReadyExpert


def event_steps(model: Transformer, cache: PagedKVCache, recorder: Recorder) -> MakeStep:
    """A maker of recorded steps for ``model``. It gives None for more than MAX_SEQUENCES sequences.

    The memory plan counts no more. Nor could more than LOGIT_ROWS be recorded, as the model then brings logits to the
    host block by block.
    """

    def make(num_sequences: int, table_width: int) -> EventStep | None:
        if num_sequences > MAX_SEQUENCES:
            return None
        return EventStep(model, recorder, DecodeInputs(recorder, cache, num_sequences, table_width), num_sequences)

    return make


class _Layer(NamedTuple):
    """A recorded part that comes to ``end``, and the recorded computation of the experts in the feed."""

    end: PartEnd
    part: Recording[PartEnd | Tensor]
    experts: Recording[None]


class EventStep(DecodeStep):
    """A recorded decode step of one shape."""

    def __init__(self, model: Transformer, recorder: Recorder, inputs: DecodeInputs, num_sequences: int) -> None:
        blocks = moe_blocks(model)
        num_experts, top_k = blocks[0].num_experts, blocks[0].top_k
        self._recorder = recorder
        self._inputs = inputs
        self._chosen = {block.layer: RecordedChoices(recorder, [block], num_sequences) for block in blocks}
        self._logits_BV = recorder.host((num_sequences, len(model.head_VH)), torch.float32)
        self._feed = WorkFeed(recorder, num_experts, min(num_experts, num_sequences * top_k))
        self._layers: list[_Layer] = []
        part = self._recorded(lambda: first_part(model, inputs.batch()))
        while isinstance(end := part.result, PartEnd):
            experts = recorder.record(partial(end.block.compute, end.routed, self._feed.work))
            self._layers.append(_Layer(end, part, experts))
            part = self._recorded(partial(next_part, end))
        self._last = part
        recorder.wait()  # from now on the host may write to the memory that has been read

    def __call__(self, new_tokens: NewTokens) -> Tensor:
        """The float32 logits [B, V] on the host, which the next call overwrites."""
        self._inputs.load(new_tokens)
        for layer in self._layers:
            layer.part.replay()
            self._recorder.wait()
            self._compute(layer)
        self._last.replay()
        self._recorder.wait()
        return self._logits_BV

    def _compute(self, layer: _Layer) -> None:
        """Computes the chosen experts of a layer, those that are resident at once, the others after their copies."""
        self._feed.rewind()
        block = layer.end.block
        chosen = self._chosen[block.layer]
        rows = Counter(chain.from_iterable(chosen.ids_NBK[0].tolist()))
        with block.acquire(rows) as lease:
            if ready := lease.at_once():
                self._replay(layer, ready)
            if chosen.report():
                lease.prefetch()
            for ready in lease:
                self._replay(layer, ready)

    def _replay(self, layer: _Layer, ready: Iterable[ReadyExpert]) -> None:
        self._feed.load(ready)
        layer.experts.replay()

    def _recorded(self, work: Callable[[], PartEnd | Tensor]) -> Recording[PartEnd | Tensor]:
        """Records a part and replays it, on padding: recording the next part runs it on this one's choice."""
        part = self._recorder.record(lambda: self._with_outputs(work()))
        part.replay()
        return part

    def _with_outputs(self, end: PartEnd | Tensor) -> PartEnd | Tensor:
        """Adds the copy of a part's choice or logits to the host to what is recorded."""
        if isinstance(end, PartEnd):
            self._chosen[end.block.layer].bring([end.routed])
        else:
            self._recorder.copy(self._logits_BV, end)
        return end
