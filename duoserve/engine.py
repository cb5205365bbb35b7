"""The engine: requests join and leave between its steps, each of which is some layers of a prefill or a decode step.

T tokens, B sequences, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from itertools import count

from torch import Tensor

from duoserve.batching.cost import MeasuredCosts
from duoserve.batching.next_work import Batching, Traffic
from duoserve.batching.traffic import as_waiting
from duoserve.config import ModelConfig
from duoserve.context_limits import ContextLimits
from duoserve.errors import (
    CopyError,
    DuoServeError,
    IntegrityError,
    MemoryBudgetError,
    OverloadedError,
)
from duoserve.interface import ServiceSettings
from duoserve.kv_cache import PagedKVCache, SequenceKV
from duoserve.metrics import Meter
from duoserve.out_of_memory import explained_refusals
from duoserve.passes import Passes, Prefill
from duoserve.request import Produced, Request
from duoserve.roster import Roster
from duoserve.sampling import token_logprobs
from duoserve.shared_errors import drop_tracebacks, own_copy

# For a list of prompts: as many at once as the KV cache holds with all of their answers, in their order.
ALL_AT_ONCE = ServiceSettings(max_batch=1 << 30, max_waiting=1 << 30, scheduler="fcfs", answer_room=1 << 30)
COMPUTING_A_PASS = "a pass was computed"
PASS_ERRORS = (CopyError, MemoryBudgetError)  # errors that end the requests of a pass and no others
log = logging.getLogger("duoserve")


class Engine:
    """Runs requests in ``passes``. Not thread-safe: one call at a time.

    ``add`` and ``abort`` requests between steps; ``step`` does one unit of work. Until ``serve_by``, requests start in
    the order of arrival, as many at once as the KV cache holds. ``limits`` bound each request.
    """

    def __init__(
        self,
        passes: Passes,
        config: ModelConfig,
        cache: PagedKVCache,
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = ContextLimits(config.vocab_size, config.num_positions, cache.num_tokens)
        self._passes = passes
        self._eos_token_ids = config.eos_token_ids
        self._cache = cache
        self._meter = meter
        self._clock = clock
        self._numbers = count()
        self._costs = MeasuredCosts()
        self._batching = Batching(ALL_AT_ONCE, self._costs, passes.num_layers)
        self._roster = Roster(passes, cache, config.vocab_size, clock)
        self._forward_kv = SequenceKV()
        self._last_was_decode = False
        self._measured = clock()  # when the last step ended whose time is in the costs

    @property
    def num_waiting(self) -> int:
        """Requests that have not been started."""
        return len(self._roster.waiting)

    @property
    def num_started(self) -> int:
        """Requests that have been started and not ended."""
        return len(self._roster.started)

    @property
    def num_sent_back(self) -> int:
        """How often a request has made way in the KV cache for those that had started before it."""
        return self._roster.num_sent_back

    @property
    def idle(self) -> bool:
        """Whether there is no work to do."""
        return not (self._roster.waiting or self._roster.decoding or self._passes.prefill)

    @property
    def kv_usage(self) -> float:
        """The share of the KV cache that requests have, 0 to 1."""
        return 1 - self._cache.free_tokens / self._cache.num_tokens

    def serve_by(self, settings: ServiceSettings) -> None:
        """Works by ``settings`` from now on. First prepares for batches of that size, which may take a while.

        Raises MemoryBudgetError if memory for that is refused.
        """
        with explained_refusals("decode steps were made ready"):
            self._passes.prepare(settings.max_batch)
        self._batching = Batching(settings, self._costs, self._passes.num_layers)

    def add(self, request: Request) -> None:
        """Adds a request. Raises RequestError if it can never be served, OverloadedError if it cannot be served now."""
        self.limits.check(request.prompt_ids, request.params.max_tokens)
        if request.arrived is None:
            request.arrived = self._clock()
        self._check_overload(request)
        request.number = next(self._numbers)
        self._roster.join(request)

    def abort(self, request: Request) -> None:
        """Ends a request: no further step works on it. Does nothing if it has ended."""
        self._roster.abort(request)

    def step(self) -> list[Produced]:
        """Does one unit of work and returns what it has produced; nothing if there is no work.

        Between two prefills there is a decode step, so that running requests end however many keep coming. A failed
        copy, or refused memory, ends the requests of its pass; non-finite logits end their own request. Any other error
        is raised, and after it only ``abort`` may be called.
        """
        roster = self._roster
        roster.release([one for one in roster.decoding if one.finish_reason])
        if self._passes.prefill is None and roster.waiting and self._prefill_has_turn:
            failed = self._start_prefill()
            if failed:
                return failed
        prefill = self._passes.prefill
        if prefill is not None:
            num_layers = self._batching.layers(roster.started_traffic(self._measured), self._prefill_has_turn)
            if num_layers:
                return self._advance_prefill(prefill, num_layers)
        return self._decode() if roster.decoding else []

    def generate(self, requests: Sequence[Request]) -> Generator[tuple[Request, int]]:
        """Yields each new token with its request, as many requests at a time as the KV cache holds.

        Raises RequestError before any work when a request cannot be served, CopyError when an expert cannot be brought,
        MemoryBudgetError when memory is refused.
        """
        for request in requests:
            self.limits.check(request.prompt_ids, request.params.max_tokens)
        self._end_all()
        self._meter.begin_request()
        try:
            for request in requests:
                self.add(request)
            while not self.idle:
                for request, token, _, error in self.step():
                    if token is None:
                        raise error or IntegrityError("a step has produced neither a token nor an error")
                    self._meter.token(request)
                    with self._meter.idle():
                        yield request, token
        finally:
            self._end_all()
            self._meter.end_request()

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """One prefill of ``token_ids``: float32 logits [T, V] of every position. Errors as in ``generate``."""
        self.limits.check(token_ids, 0)
        self._end_all()
        self._meter.begin_request()
        try:
            self._cache.reserve(self._forward_kv, len(token_ids))
            self._meter.prompt(len(token_ids))
            with explained_refusals(COMPUTING_A_PASS):
                return self._passes.whole(next(self._numbers), self._forward_kv, token_ids)
        finally:
            self._end_all()
            self._meter.end_request()

    def check_integrity(self) -> None:
        """Raises IntegrityError if pages or holds outlive their requests, or if the books of the slots disagree."""
        self._roster.check_integrity()
        self._passes.check_integrity()

    @property
    def _prefill_has_turn(self) -> bool:
        """Whether it is a prefill's turn: the last step was a decode step, or no request decodes."""
        return self._last_was_decode or not self._roster.decoding

    def _traffic(self) -> Traffic:
        return self._roster.traffic(self._batching.settings.answer_room, self._measured)

    def _check_overload(self, request: Request) -> None:
        """Raises OverloadedError if the settings allow no more requests, or if this one would miss its objective."""
        settings, asked = self._batching.settings, as_waiting(request, self._batching.settings.answer_room)
        num_new = sum(one.admitted is None for one in self._roster.waiting)
        if num_new >= settings.max_waiting + max(0, settings.max_batch - self.num_started):
            raise OverloadedError(
                f"{num_new} requests wait and {self.num_started} run: max_batch={settings.max_batch} and "
                f"max_waiting={settings.max_waiting} allow no more: try again later",
                max(0.1, self._batching.first_token_s(asked, self._traffic())),
            )
        if settings.admission == "strict":
            refusal = self._batching.refusal(asked, self._traffic())
            if refusal is not None:
                raise OverloadedError(f"the request would miss its objective: {refusal.why}", refusal.retry_after_s)

    def _end_all(self) -> None:
        """Ends what this call has begun, and what an interrupted earlier call has left."""
        self._passes.end_all()
        self._cache.release(self._forward_kv)
        for request in self._roster.everyone:
            self._roster.abort(request)

    def _start_prefill(self) -> list[Produced]:
        """Begins a prefill of the waiting requests whose turn it is; returns those that this ended."""
        now = self._clock()
        chosen = self._roster.take(self._batching.start(self._traffic()), self._batching.settings.answer_room)
        for request in chosen:
            if request.admitted is None:
                request.admitted = now
                self._meter.prompt(len(request.prompt_ids))
        if not chosen:
            return []
        try:
            with explained_refusals(COMPUTING_A_PASS):
                self._passes.start_prefill(chosen, interruptible=bool(self._roster.decoding))
        except PASS_ERRORS as error:
            return self._fail(chosen, error)
        return []

    def _advance_prefill(self, prefill: Prefill, num_layers: int) -> list[Produced]:
        self._last_was_decode = False
        begun = self._clock()
        try:
            with explained_refusals(COMPUTING_A_PASS):
                logits_BV = self._passes.advance(prefill, num_layers)
        except PASS_ERRORS as error:
            return self._fail(prefill.requests, error)
        self._measured = self._clock()
        self._costs.note_prefill(prefill.num_tokens, num_layers, self._measured - begun)
        if logits_BV is None:
            return []
        self._roster.prefilled(prefill.requests)
        return self._sample_all(prefill.requests, logits_BV)

    def _decode(self) -> list[Produced]:
        self._last_was_decode = True
        requests, begun = self._roster.make_room(), self._clock()
        if not requests:
            return []
        try:
            with explained_refusals(COMPUTING_A_PASS):
                logits_BV = self._passes.decode(requests)
        except PASS_ERRORS as error:
            return self._fail(requests, error)
        produced = self._sample_all(requests, logits_BV)
        self._measured = self._clock()
        self._costs.note_decode(len(requests), self._measured - begun)
        return produced

    def _sample_all(self, requests: Sequence[Request], logits_BV: Tensor) -> list[Produced]:
        produced = []
        for request, logits_V in zip(requests, logits_BV, strict=True):
            if request.finish_reason is None and request.caught_up:
                try:
                    produced.append(self._sample(request, logits_V))
                except IntegrityError:
                    raise
                except DuoServeError as error:
                    drop_tracebacks(error)
                    request.finish("error")
                    produced.append(Produced(request, error=error))
            if request.finish_reason is not None:
                self._roster.release([request])
        return produced

    def _sample(self, request: Request, logits_V: Tensor) -> Produced:
        with self._meter.compute():
            token = self._roster.sample(request, logits_V)
            wanted = request.num_logprobs
            logprobs = None if wanted is None else token_logprobs(logits_V, token, wanted)
        request.output_ids.append(token)
        request.last_token = self._clock()
        if request.first_token is None:
            request.first_token = request.last_token
        if token in self._eos_token_ids and not request.params.ignore_eos:
            request.finish("stop")
        elif len(request.output_ids) >= request.params.max_tokens:
            request.finish("length")
        return Produced(request, token, logprobs)

    def _fail(self, requests: Sequence[Request], error: DuoServeError) -> list[Produced]:
        """Ends these requests with ``error``, which keeps no tensor of the pass; aborted ones get no word of it."""
        log.debug("a pass has failed", exc_info=error)
        drop_tracebacks(error)
        failed = [Produced(request, error=own_copy(error)) for request in requests if request.finish_reason is None]
        for request in requests:
            request.finish("error")
        self._roster.release(requests)
        return failed
