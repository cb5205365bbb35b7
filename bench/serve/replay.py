"""Recorded routing in the routers' place, step by step, and experts that share rows of host memory.

L MoE layers, R requests, P prompt tokens, K top-k, S decode steps, B bytes of a row, N rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duoserve.config import Phase
from duoserve.errors import CopyError, IntegrityError
from duoserve.experts.layout import ExpertId, ExpertLayout, round_up
from duoserve.experts.pinned import pin, unpin
from duoserve.experts.rows import aligned_rows
from duoserve.experts.store import ExpertStore
from duoserve.models.moe import RoutingScript
from duoserve.passes import StepScheduler
from duoserve.scheduling.routing import Routing, RoutingListener
from duoserve.scheduling.source import ExpertSource, Lease
from duoserve.traces.trace import RequestTrace, Trace

PAGE_BYTES = 4096
BLOCK_BYTES = (64 << 20) + PAGE_BYTES  # random bytes are repeated after so many: no divisor of an expert's row
WEIGHT_STD = 0.02


class HostArena:
    """Host memory full of small random weights, page-locked if ``pinned``: any row of it is an expert in any format."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        pages = aligned_rows(nbytes // PAGE_BYTES, PAGE_BYTES)
        self.flat_B = pages.flatten()
        block_B = random_weights(min(BLOCK_BYTES, nbytes // PAGE_BYTES * PAGE_BYTES))
        for start in range(0, len(self.flat_B), len(block_B)):
            part_B = self.flat_B[start : start + len(block_B)]
            part_B.copy_(block_B[: len(part_B)])
        self._pages = pages
        self.pinned = pinned and pin(pages)

    def close(self) -> None:
        """Before the memory goes."""
        if self.pinned:
            unpin(self._pages)
            self.pinned = False


def random_weights(nbytes: int) -> Tensor:
    """Small bfloat16 numbers as bytes, none of which is NaN in e4m3: codes and scales of any format too."""
    generator = torch.Generator().manual_seed(0)
    bytes_B = (torch.randn(nbytes // 2, generator=generator) * WEIGHT_STD).bfloat16().view(torch.uint8)
    bytes_B[(bytes_B & 0x7F) == 0x7F] -= 1
    return bytes_B


class SharedRows(ExpertStore):
    """Every expert has a row of the arena; where these do not suffice, some share one."""

    def __init__(self, arena: HostArena, layout: ExpertLayout, num_experts: int) -> None:
        self.layout = layout
        self.num_rows = len(arena.flat_B) // layout.slot_bytes
        self._num_experts = num_experts
        self._rows_NB = arena.flat_B[: self.num_rows * layout.slot_bytes].view(-1, layout.slot_bytes)

    def read(self, expert: ExpertId, row_B: Tensor) -> None:
        """As in ExpertStore."""
        row = self.host_row(expert)
        np.copyto(row_B.numpy(), row.numpy())

    def host_row(self, expert: ExpertId) -> Tensor:
        """As in ExpertStore; CopyError where the arena holds no row at all."""
        if not self.num_rows:
            raise CopyError(f"an expert of {self.layout.slot_bytes} bytes is larger than the arena")
        return self._rows_NB[(expert.layer * self._num_experts + expert.expert) % self.num_rows]

    def close(self) -> None:
        """The arena is the caller's."""


@dataclass(frozen=True)
class Tape:
    """The routing of some requests, side by side: their prompts in one pass, then a token of each a step.

    ``said`` has it on the host, pass by pass and layer by layer; the tensors have what is chosen on the device.
    """

    said: tuple[tuple[Routing, ...], ...]
    prompt_ids_LNK: Tensor
    prompt_weights_LNK: Tensor
    ids_SLRK: Tensor
    weights_SLRK: Tensor

    @classmethod
    def of(cls, trace: Trace, numbers: Iterable[int], device: torch.device) -> Tape:
        """Of the requests ``numbers`` of ``trace``, as far as the shortest goes."""
        requests = [trace[number] for number in numbers]
        num_passes = min(request.num_steps for request in requests)
        said = tuple(_side_by_side(requests, at) for at in range(num_passes))
        prompts, *steps = [_chosen(layers) for layers in said]
        decoded = [np.stack(parts) for parts in zip(*steps, strict=True)]
        return cls(said, *(torch.from_numpy(part).to(device) for part in (*prompts, *decoded)))

    def prompt_experts(self) -> list[set[int]]:
        """What each layer's prompts are routed to."""
        return [set(ids_NK.unique().tolist()) for ids_NK in self.prompt_ids_LNK]

    def experts(self, num_steps: int) -> list[set[int]]:
        """What each layer asks for in the first ``num_steps`` decode steps, layer by layer in every step."""
        layers = self.ids_SLRK[:num_steps].flatten(0, 1).flatten(1)
        return [set(ids) for ids in layers.tolist()]


class RoutingReplay(RoutingScript):
    """Plays the tape that was put in. A decode step's choice lies at one address in all steps, as a graph wants it.

    ``layers`` are the model's MoE layers, as many as the tape has.
    """

    def __init__(self, tape: Tape, layers: Sequence[int]) -> None:
        self._layers = list(layers)
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._ids_LN, self._weights_LN = (_aligned_like(steps[0]) for steps in (tape.ids_SLRK, tape.weights_SLRK))
        self.play(tape)

    def play(self, tape: Tape) -> None:
        """From now on ``tape``, of as many requests as the first."""
        self._tape = tape
        self._step = -1  # of decode; -1 is the prompt

    def begin(self, phase: Phase) -> None:
        """A pass begins: a prompt from the beginning, or the next step."""
        self._step = -1 if phase is Phase.PREFILL else self._step + 1
        if phase is Phase.DECODE:
            tape = self._tape
            for now_LN, steps_SLRK in ((self._ids_LN, tape.ids_SLRK), (self._weights_LN, tape.weights_SLRK)):
                chosen_LN = steps_SLRK[self._step].flatten(1)
                now_LN[:, : chosen_LN.shape[1]].copy_(chosen_LN)

    def chosen(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """As in RoutingScript."""
        place, tape = self._place[layer], self._tape
        if self._step < 0:
            return tape.prompt_weights_LNK[place, :num_tokens], tape.prompt_ids_LNK[place, :num_tokens]
        top_k = tape.ids_SLRK.shape[-1]
        weights_N, ids_N = (now_LN[place, : num_tokens * top_k] for now_LN in (self._weights_LN, self._ids_LN))
        return weights_N.view(-1, top_k), ids_N.view(-1, top_k)

    def ahead(self, layer: int, num_tokens: int) -> dict[int, np.ndarray]:
        """The tape's look-ahead scores of the first rows, by the model's layer numbers instead of the trace's."""
        said = self._tape.said[self._step + 1][self._place[layer]]
        later = {self._layers[self._place[layer] + other - said.layer]: rows for other, rows in said.ahead.items()}
        return {other: scores_TE[:num_tokens] for other, scores_TE in later.items()}


class TapedScores(RoutingListener):
    """Tells ``listener`` what a tap hears, with the tape's look-ahead scores instead of those of random weights.

    The tap makes its own all the same, so that they cost what they cost.
    """

    def __init__(self, listener: RoutingListener, replay: RoutingReplay) -> None:
        self._listener = listener
        self._replay = replay

    @property
    def lookahead(self) -> int:
        """As many layers as the listener wants."""
        return self._listener.lookahead

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        """As in RoutingListener."""
        self._listener.begin(phase, requests_T)

    def routed(self, routing: Routing) -> None:
        """As in RoutingListener."""
        taped = self._replay.ahead(routing.layer, len(routing.topk_ids_TK))
        self._listener.routed(routing._replace(ahead=taped))


def _aligned_like(step_LRK: Tensor) -> Tensor:
    """Room for a step, every layer on 16 bytes: Triton compiles another kernel for pointers that are not."""
    width = round_up(step_LRK[0].numel(), 16 // step_LRK.element_size())
    return step_LRK.new_zeros(len(step_LRK), width)


def _side_by_side(requests: Sequence[RequestTrace], at: int) -> tuple[Routing, ...]:
    """Every layer's routing of step ``at``, the requests' rows one after another."""
    layers = zip(*(request.routing(at) for request in requests), strict=True)
    return tuple(_joined(routings) for routings in layers)


def _joined(routings: Sequence[Routing]) -> Routing:
    first = routings[0]
    parts = zip(*((r.requests_T, r.topk_ids_TK, r.topk_weights_TK) for r in routings), strict=True)
    ahead = {later: np.concatenate([r.ahead[later] for r in routings]) for later in first.ahead}
    return Routing(first.layer, *map(np.concatenate, parts), ahead)


def _chosen(layers: Sequence[Routing]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int64) and weights (float32) [L, N, K] of one pass."""
    return np.stack([said.topk_ids_TK for said in layers]), np.stack([said.topk_weights_TK for said in layers])


class AskedFor(ExpertSource):
    """Notes what the layers ask ``source`` for, in ``experts``."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        self.experts: list[Sequence[int]] = []

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> Lease:
        """As in ExpertSource."""
        self.experts.append(experts)
        return self._source.acquire(layer, experts, counts)


class ReplayedPasses(StepScheduler):
    """Tells the replay of each pass before the scheduler; ``seconds`` is what that has taken of the host in all."""

    def __init__(self, scheduler: StepScheduler, replay: RoutingReplay) -> None:
        self.seconds = 0.0
        self._scheduler = scheduler
        self._replay = replay

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """A pass begins."""
        began = time.perf_counter()
        self._replay.begin(phase)
        self.seconds += time.perf_counter() - began
        self._scheduler.begin(phase, num_tokens)

    def end(self) -> None:
        """The pass has ended."""
        self._scheduler.end()

    def set_aside(self) -> None:
        """Never: the requests of a cell are prefilled before the first step."""
        raise IntegrityError("a replayed prefill cannot be set aside")

    def resume(self) -> None:
        """Never: see ``set_aside``."""
        raise IntegrityError("a replayed prefill cannot be resumed")

    def give_up_aside(self) -> None:
        """Never: see ``set_aside``."""
        raise IntegrityError("a replayed prefill cannot be given up")

    def end_all(self) -> None:
        """All passes have ended."""
        self._scheduler.end_all()

    def check_integrity(self) -> None:
        """See Scheduler."""
        self._scheduler.check_integrity()
