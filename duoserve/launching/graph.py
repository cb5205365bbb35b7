"""Decode steps that are one recording each, which the device carries out without the host.

The device has the table of slots, and a kernel brings missing experts from the host's RAM into slots that are kept free
for them ("read-through"). The host learns afterwards what the routers chose. Before it launches the next step, it sets
slots aside for that step's misses, and copies experts ahead that the step is likely to want.

B sequences, K top-k, E experts, L layers of the model, N of them that have experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from duoserve.experts.layout import ExpertId
from duoserve.experts.store import ExpertStore
from duoserve.kernels import HostRows
from duoserve.kernels.recorder import Recorder
from duoserve.kv_cache import NewTokens, PagedKVCache
from duoserve.launching.inputs import DecodeInputs
from duoserve.launching.recorded import MAX_SEQUENCES, MakeStep
from duoserve.launching.recorded_choices import RecordedChoices
from duoserve.models.moe import MoEBlock
from duoserve.models.parts import PartEnd, first_part, moe_blocks, next_part
from duoserve.models.transformer import Transformer
from duoserve.passes import DecodeStep
from duoserve.scheduling.read_through import ReadThrough


def graph_steps(
    model: Transformer, cache: PagedKVCache, recorder: Recorder, store: ExpertStore, books: ReadThrough
) -> MakeStep:
    """A maker of recorded steps for ``model``, whose experts all lie in RAM that the device reads: see ``host_rows``.

    It gives None for more than MAX_SEQUENCES sequences, or if a layer may miss more experts than there are slots.
    """
    rows = {block.layer: host_rows(block, store, recorder.device) for block in moe_blocks(model)}

    def make(num_sequences: int, table_width: int) -> GraphStep | None:
        if num_sequences > MAX_SEQUENCES or not books.fits(num_sequences):
            return None
        inputs = DecodeInputs(recorder, cache, num_sequences, table_width)
        return GraphStep(model, recorder, inputs, num_sequences, rows=rows, books=books)

    return make


def host_rows(block: MoEBlock, store: ExpertStore, device: torch.device) -> HostRows:
    """The rows of a layer's experts in RAM; raises KernelError if ``device`` cannot read there."""
    experts = (ExpertId(block.layer, expert) for expert in range(block.num_experts))
    return HostRows.of([store.host_row(expert) for expert in experts], device)


class GraphStep(DecodeStep):
    """A recorded decode step for batches of one size with one width of page table.

    ``books`` says which expert is in which slot; ``rows`` has the host's rows by layer.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: Transformer,
        recorder: Recorder,
        inputs: DecodeInputs,
        num_sequences: int,
        *,
        rows: Mapping[int, HostRows],
        books: ReadThrough,
    ) -> None:
        blocks = moe_blocks(model)
        self._num_sequences = num_sequences
        self._recorder = recorder
        self._inputs = inputs
        self._rows = rows
        self._books = books
        # The slots of the experts, and those that the misses of a layer fill, in one tensor: one copy brings both.
        self._host_2LE = recorder.host((2, *books.slots_LE.shape), torch.int32)
        self._host_2LE.fill_(-1)
        self._tables_2LE = self._host_2LE.to(recorder.device, copy=True)
        self._chosen = RecordedChoices(recorder, blocks, num_sequences)
        self._logits_BV = recorder.host((num_sequences, len(model.head_VH)), torch.float32)
        self._recording = recorder.record(lambda: self._run(model))

    def __call__(self, new_tokens: NewTokens) -> Tensor:
        """Replays the step; gives float32 logits [B, V] on the host, which the next call overwrites."""
        self._inputs.load(new_tokens)
        targets_NX = self._books.lay_targets(self._num_sequences)
        slots_LE, targets_LE = self._host_2LE.numpy()
        slots_LE[:] = self._books.slots_LE
        targets_LE.fill(-1)
        targets_LE[self._books.layers, : targets_NX.shape[1]] = targets_NX
        try:
            self._recording.replay()
            self._books.catch_up()
        finally:  # also on an error: the device is filling slots that the books call EMPTY, and reads the host's rows
            self._recorder.wait()
        self._books.took(self._chosen.ids_NBK.numpy())
        if self._chosen.report():
            self._books.guess()
        return self._logits_BV

    def _run(self, model: Transformer) -> None:
        self._recorder.copy(self._tables_2LE, self._host_2LE)
        slots_LE, targets_LE = self._tables_2LE.unbind()
        end, chosen = first_part(model, self._inputs.batch(), slots_LE), []
        while isinstance(end, PartEnd):
            block, routed = end.block, end.routed
            block.compute(routed, routed.plan.resident)
            if self._books.may_miss:
                block.compute_missing(routed, self._rows[block.layer], targets_LE[block.layer])
            chosen.append(routed)
            end = next_part(end)
        self._chosen.bring(chosen)
        self._recorder.copy(self._logits_BV, end)
