"""The chosen experts of a compiled decode step: compiled calls for experts of few rows, the model's ops for others.

B sequences, K top-k, H hidden, I expert intermediate, R = B * K routed rows, J of them of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from duoserve.kernels import HostWork, RoutePlan, route_plan
from duoserve.kernels.compiled.compiler import CompiledRecording, CpuCompiler
from duoserve.kernels.compiled.token_expert import NO_CALLS, SlotWeights, call_rows, token_expert
from duoserve.models.moe import MoEBlock, Routed
from duoserve.models.parts import PartEnd, moe_blocks
from duoserve.models.transformer import Transformer
from duoserve.scheduling.source import ReadyExpert


class StepRows(NamedTuple):
    """The memory of a step's routed rows: the inputs of experts, what ops keep in between, and the outputs."""

    x_BH: Tensor
    act_RI: Tensor
    y_RH: Tensor

    def first(self, num_sequences: int, top_k: int) -> StepRows:
        """The rows of the first ``num_sequences`` sequences."""
        num_rows = num_sequences * top_k
        return StepRows(self.x_BH[:num_sequences], self.act_RI[:num_rows], self.y_RH[:num_rows])

    def holding(self, end: PartEnd) -> PartEnd:
        """The same end with its rows copied to this memory, as part of what is recorded."""
        self.x_BH.copy_(end.routed.x_TH)
        return end._replace(routed=self.in_place_of(end.routed))

    def in_place_of(self, routed: Routed) -> Routed:
        """The same choice with its rows in this memory."""
        return routed._replace(x_TH=self.x_BH, act_RI=self.act_RI, y_RH=self.y_RH)


class Chosen:
    """What the sequences of a step chose in one layer, without padding."""

    def __init__(self, ids_BK: list[list[int]]) -> None:
        self._ids_BK = ids_BK
        self.places: dict[int, list[int]] = {}  # expert -> its rows ``b * K + j``, ascending
        for place, expert in enumerate(expert for ids_K in ids_BK for expert in ids_K):
            self.places.setdefault(expert, []).append(place)

    @property
    def num_rows(self) -> dict[int, int]:
        """The number of rows of each expert that has any."""
        return {expert: len(places) for expert, places in self.places.items()}

    @property
    def num_sequences(self) -> int:
        """Sequences of the step."""
        return len(self._ids_BK)

    @cached_property
    def plan(self) -> RoutePlan:
        """The choice as a plan for the model's ops."""
        no_slots_E = torch.full((1 + max(self.places),), -1, dtype=torch.int32, device="cpu")
        return route_plan(torch.tensor(self._ids_BK, device="cpu"), no_slots_E)


class CompiledExperts:
    """Computes the experts of steps of up to ``num_sequences`` sequences, whose ``rows`` all layers share.

    So one compiled call serves all layers and steps. An expert of many rows takes several calls.
    """

    def __init__(self, compiler: CpuCompiler, model: Transformer, num_sequences: int) -> None:
        self._compiler = compiler
        self._block = block = moe_blocks(model)[0]
        x_VH, num_rows = model.embed_VH, num_sequences * block.top_k
        hidden = x_VH.shape[1]
        self.rows = StepRows(
            x_VH.new_zeros(num_sequences, hidden),
            x_VH.new_zeros(num_rows, block.weights.w2.inner),
            x_VH.new_zeros(num_rows + 1, hidden),  # the last row is spare: the padding of calls is written there
        )
        self._sizes = call_rows(block.weights) if block.clamped is None else NO_CALLS
        self._calls: dict[int, _Call] = {}

    def prepare(self, num_sequences: int) -> None:
        """Makes the calls for steps of ``num_sequences`` sequences, all of which may choose the same expert."""
        for num_rows in range(1, min(num_sequences, self._sizes.most) + 1):
            self._call(num_rows)

    def compute(self, end: PartEnd, chosen: Chosen, ready: Iterable[ReadyExpert]) -> None:
        """Computes the experts that are ``ready``; ``rows`` must hold the step's choice."""
        by_ops = []
        for expert, slot in ready:
            places = chosen.places[expert]
            if len(places) > self._sizes.most:
                by_ops.append((expert, slot))
            else:
                self._by_calls(slot, places)
        if by_ops:
            end.block.compute(self._real(end.routed, chosen), HostWork.of(by_ops))

    def _by_calls(self, slot: int, places: Sequence[int]) -> None:
        while places:
            call = self._call(len(places))
            call(slot, places[: call.num_rows])
            places = places[call.num_rows :]

    def _call(self, num_rows: int) -> _Call:
        """The next call for an expert that has ``num_rows`` rows left."""
        size = self._sizes.next_call(num_rows)
        if size not in self._calls:
            self._calls[size] = _Call(self._compiler, self._block, self.rows, size)
        return self._calls[size]

    def _real(self, routed: Routed, chosen: Chosen) -> Routed:
        """The choice ``routed`` without its padding."""
        rows = self.rows.first(chosen.num_sequences, self._block.top_k)
        return rows.in_place_of(routed)._replace(plan=chosen.plan)


class _Call:
    """A compiled call for J rows of one expert, in any slot.

    With fewer rows the last is repeated, and the copies' results go to a spare row.
    """

    def __init__(self, compiler: CpuCompiler, block: MoEBlock, rows: StepRows, num_rows: int) -> None:
        self.num_rows, self._top_k, self._nowhere = num_rows, block.top_k, len(rows.y_RH) - 1
        self._weights = block.weights
        host_2J = compiler.host((2, num_rows), torch.int64)
        tokens_J, places_J = host_2J.unbind()
        places_J.fill_(self._nowhere)  # a call may be recorded between two others of a layer
        self._host_2J: np.ndarray = host_2J.numpy()
        self._first = SlotWeights.of(block.weights, 0)
        operands = rows.x_BH, self._first, tokens_J, places_J, rows.y_RH
        self._recording = compiler.record(partial(token_expert, *operands))
        self._by_slot: dict[int, CompiledRecording[None]] = {}

    def __call__(self, slot: int, places: Sequence[int]) -> None:
        """Computes the expert in ``slot`` for the routed rows ``places``."""
        padding = self.num_rows - len(places)
        self._host_2J[0] = [place // self._top_k for place in (*places, *[places[-1]] * padding)]
        self._host_2J[1] = [*places, *[self._nowhere] * padding]
        self._in_slot(slot).replay()

    def _in_slot(self, slot: int) -> CompiledRecording[None]:
        if slot not in self._by_slot:
            others = dict(zip(self._first.tensors, SlotWeights.of(self._weights, slot).tensors, strict=True))
            self._by_slot[slot] = self._recording.on(others)
        return self._by_slot[slot]
