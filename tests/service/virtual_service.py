"""A service on a virtual clock: the real engine and planner, with passes that take time and compute nothing.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from duoserve.engine import Engine
from duoserve.errors import MemoryBudgetError, OverloadedError
from duoserve.interface import Objectives, ServiceSettings
from duoserve.kv_cache import PAGE_TOKENS, SequenceKV
from duoserve.metrics import Meter
from duoserve.request import Request
from tests.helpers.toys import greedy

VOCAB = 4


class Rates(NamedTuple):
    """Seconds: ``pass_s`` for a layer of a prefill and ``token_s`` for each token; ``step_s``, decode by batch size."""

    num_layers: int
    pass_s: float
    token_s: float
    step_s: dict[int, float]

    def decode_s(self, batch: int) -> float:
        """A step: on the line between the sizes that are known, in proportion beyond the largest."""
        sizes = sorted(self.step_s)
        above = next((size for size in sizes if size >= batch), None)
        if above is None:
            return self.step_s[sizes[-1]] * batch / sizes[-1]
        below = max((size for size in sizes if size <= batch), default=above)
        if above == below:
            return self.step_s[above]
        share = (batch - below) / (above - below)
        return self.step_s[below] + share * (self.step_s[above] - self.step_s[below])

    def layer_s(self, tokens: int) -> float:
        """A layer of a prefill."""
        return self.pass_s + self.token_s * tokens


@dataclass
class Clock:
    """Seconds that pass only by work, and by waiting for an arrival."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class _Partial:
    next_layer: int = 0


@dataclass(eq=False)
class _Prefill:
    requests: list[Request]
    num_tokens: int
    partial: _Partial = field(default_factory=_Partial)


class VirtualPasses:
    """Passes as the engine knows them, which take what ``rates`` say."""

    def __init__(self, rates: Rates, clock: Clock) -> None:
        self.num_layers = rates.num_layers
        self.prefill: _Prefill | None = None
        self._rates = rates
        self._clock = clock

    def prepare(self, num_sequences: int) -> None:
        """Nothing: no step takes longer the first time."""

    def start_prefill(self, requests: list[Request], interruptible: bool) -> _Prefill:
        """Begins a pass."""
        for request in requests:
            request.kv.length = len(request.prompt_ids)
        self.prefill = _Prefill(requests, sum(len(request.prompt_ids) for request in requests))
        return self.prefill

    def advance(self, prefill: _Prefill, num_layers: int) -> Tensor | None:
        """Some layers of it."""
        prefill.partial.next_layer += num_layers
        self._clock.now += num_layers * self._rates.layer_s(prefill.num_tokens)
        done = prefill.partial.next_layer >= self.num_layers
        if not done:
            return None
        self.prefill = None
        return torch.zeros(len(prefill.requests), VOCAB)

    def abandon(self, prefill: _Prefill) -> None:
        """Nothing is left of it."""
        self.prefill = None

    def decode(self, requests: Sequence[Request]) -> Tensor:
        """A token for each."""
        self._clock.now += self._rates.decode_s(len(requests))
        for request in requests:
            request.kv.length += 1
        return torch.zeros(len(requests), VOCAB)


class VirtualPages:
    """The books of a KV cache that has no memory."""

    def __init__(self, max_tokens: int) -> None:
        self.num_tokens = self.free_tokens = max_tokens

    @staticmethod
    def whole_pages(num_tokens: int) -> int:
        """As in PagedKVCache."""
        return -(-num_tokens // PAGE_TOKENS) * PAGE_TOKENS

    def reserve(self, kv: SequenceKV, num_tokens: int) -> None:
        """As in PagedKVCache."""
        missing = max(0, self.whole_pages(num_tokens) - kv.room)
        kv.pages += [-1] * (missing // PAGE_TOKENS)
        self.free_tokens -= missing
        if self.free_tokens < 0:
            raise MemoryBudgetError("the engine has started what there is no room for")

    def release(self, kv: SequenceKV) -> None:
        """As in PagedKVCache."""
        self.free_tokens += kv.room
        kv.pages, kv.length = [], 0


class Arrival(NamedTuple):
    """A request: when it comes, how long its prompt and its answer are, what it hopes for."""

    at: float
    prompt: int
    answer: int
    objectives: Objectives = Objectives()


class _Vocabulary(NamedTuple):
    vocab_size: int = VOCAB
    num_positions: int = 1 << 20
    eos_token_ids: tuple[int, ...] = ()


def serve(
    arrivals: Sequence[Arrival],
    rates: Rates,
    settings: ServiceSettings,
    *,
    room: int = 1 << 20,
    until: float = 1e9,
    passes: type[VirtualPasses] = VirtualPasses,
) -> list[Request]:
    """Every request of ``arrivals`` (in their order) as the engine has left it, when all are done or the time is up.

    One that is refused has no number.
    """
    clock, pages = Clock(), VirtualPages(room)
    parts: Any = passes(rates, clock), _Vocabulary(), pages
    engine = Engine(*parts, Meter(clock), clock)
    engine.serve_by(settings)
    _warm_up(engine, rates)
    clock.now, served = 0.0, list[Request]()
    left = list(reversed(arrivals))
    while (left or not engine.idle) and clock.now < until:
        if engine.idle:
            clock.now = max(clock.now, left[-1].at)
        while left and left[-1].at <= clock.now:
            served.append(_request(left.pop()))
            with suppress(OverloadedError):
                engine.add(served[-1])
        engine.step()
        assert 0 <= pages.free_tokens == room - sum(request.kv.room for request in served)
    return served


def _request(one: Arrival) -> Request:
    return Request([1] * one.prompt, greedy(one.answer), objectives=one.objectives, arrived=one.at)


def _warm_up(engine: Engine, rates: Rates) -> None:
    """The engine has seen some work, as a service has that has been up for a while."""
    costs = cast(Any, engine)._costs
    for size in (1, 2, 4, 8):
        costs.note_decode(size, rates.decode_s(size))
        costs.note_prefill(48 * size, 1, rates.layer_s(48 * size))


def attained(served: Sequence[Request]) -> float:
    """The share that met both objectives."""
    return sum(request.attained for request in served) / len(served)
