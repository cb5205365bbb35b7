"""Prefill once, decode until done.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from duoserve.config import ModelConfig, Phase
from duoserve.errors import RequestError
from duoserve.kv_cache import Layout, PagedKVCache, SequenceKV
from duoserve.metrics import Meter
from duoserve.models.tap import RoutingTap
from duoserve.models.transformer import Transformer
from duoserve.sampling import Sampler, SamplingParams


class StepScheduler(Protocol):
    """What the engine needs of the scheduler: to be told where a forward pass begins and ends."""

    def begin(self, phase: Phase, num_tokens: int) -> None: ...

    def end(self) -> None: ...


class Decoder(Protocol):
    """Another way to compute a decode step, with the bits of the model."""

    def __call__(self, layout: Layout) -> Tensor:
        """Float32 logits [B, V], on the host, of the new token of each of B sequences."""
        ...


@dataclass(eq=False)
class Request:
    """One prompt on its way. ``finish_reason`` is None while it runs, then "stop" or "length".

    ``number`` is the engine's, from 0 in the order of arrival.
    """

    prompt_ids: list[int]
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    kv: SequenceKV = field(default_factory=SequenceKV)
    number: int = -1

    @property
    def num_tokens(self) -> int:
        """Tokens of context that the request may come to need."""
        return len(self.prompt_ids) + self.params.max_tokens

    def finish(self, reason: str) -> None:
        """Ends the request before its next token."""
        self.finish_reason = reason


class Engine:
    """Runs requests on one model, whose ``tap`` (if its routers are listened to) hears of every pass.

    ``decoder``, if there is one, computes the decode steps. Not thread-safe: one call at a time.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: Transformer,
        config: ModelConfig,
        scheduler: StepScheduler,
        cache: PagedKVCache,
        meter: Meter,
        *,
        tap: RoutingTap | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._scheduler = scheduler
        self._cache = cache
        self._meter = meter
        self._decoder = decoder
        self._tap = tap
        self._numbers = count()

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """Yields each new token with its request, as many requests at a time as the KV cache holds.

        Raises RequestError before any work when a request cannot be served, CopyError when an expert cannot be brought.
        """
        for request in requests:
            self._check(request.prompt_ids, request.params.max_tokens)
            request.number = next(self._numbers)
        self._meter.begin_request()
        try:
            for group in self._groups(requests):
                for produced in self._serve(group):
                    with self._meter.idle():
                        yield produced
        finally:
            self._meter.end_request()

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """One prefill of ``token_ids``: float32 logits [T, V] of every position."""
        self._check(token_ids, 0)
        kv = SequenceKV()
        self._meter.begin_request()
        try:
            self._cache.reserve(kv, len(token_ids))
            self._meter.prompt(len(token_ids))
            self._announce(Phase.PREFILL, [(next(self._numbers), token_ids)])
            return self._step(Phase.PREFILL, self._cache.lay_out([(kv, token_ids)]), rows=None)
        finally:
            self._cache.release(kv)
            self._meter.end_request()

    def _check(self, token_ids: Sequence[int], max_tokens: int) -> None:
        vocab, room = self._config.vocab_size, self._cache.num_tokens
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        bad = next((t for t in token_ids if not 0 <= t < vocab), None)
        if bad is not None:
            raise RequestError(f"token id {bad} lies outside the vocabulary, 0..{vocab - 1}")
        if len(token_ids) + max_tokens > room:
            raise RequestError(
                f"{len(token_ids)} prompt tokens and max_tokens={max_tokens} exceed the context of {room} tokens: "
                "lower max_tokens, shorten the prompt, or load the model with a larger max_context"
            )

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """The requests in order, cut where the KV cache would run over."""
        group: list[Request] = []
        used = 0
        for request in requests:
            need = self._cache.whole_pages(request.num_tokens)
            if group and used + need > self._cache.num_tokens:
                yield group
                group, used = [], 0
            group.append(request)
            used += need
        yield group

    def _serve(self, requests: list[Request]) -> Iterator[tuple[Request, int]]:
        samplers = {request: Sampler(request.params, self._config.vocab_size) for request in requests}
        try:
            for request in requests:
                self._cache.reserve(request.kv, request.num_tokens)
                self._meter.prompt(len(request.prompt_ids))
            phase, fresh = Phase.PREFILL, [(request, request.prompt_ids) for request in requests]
            while fresh:
                layout = self._cache.lay_out([(request.kv, tokens) for request, tokens in fresh])
                self._announce(phase, [(request.number, tokens) for request, tokens in fresh])
                logits_BV = self._step(phase, layout, layout.last_rows)
                for (request, _), logits_V in zip(fresh, logits_BV, strict=True):
                    yield request, self._sample(request, samplers[request], logits_V)
                running = [request for request, _ in fresh if request.finish_reason is None]
                phase, fresh = Phase.DECODE, [(request, request.output_ids[-1:]) for request in running]
        finally:
            for request in requests:
                self._cache.release(request.kv)

    def _announce(self, phase: Phase, fresh: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Tells the tap whose token each row of the coming pass is."""
        if self._tap is not None:
            rows = [number for number, tokens in fresh for _ in tokens]
            self._tap.begin(phase, np.array(rows, dtype=np.int64))

    @torch.inference_mode()
    def _step(self, phase: Phase, layout: Layout, rows: list[int] | None) -> Tensor:
        with self._meter.compute():
            self._scheduler.begin(phase, len(layout.token_ids))
            try:
                if phase is Phase.DECODE and self._decoder is not None:
                    return self._decoder(layout)
                return self._model(self._cache.batch(layout), rows).cpu()
            finally:
                self._scheduler.end()

    def _sample(self, request: Request, sampler: Callable[[Tensor, Sequence[int]], int], logits_V: Tensor) -> int:
        with self._meter.compute():
            token = sampler(logits_V, request.prompt_ids + request.output_ids)
        request.output_ids.append(token)
        self._meter.token(request)
        if token in self._config.eos_token_ids and not request.params.ignore_eos:
            request.finish("stop")
        elif len(request.output_ids) >= request.params.max_tokens:
            request.finish("length")
        return token
