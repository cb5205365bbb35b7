"""The requests that an engine has, and what each of them holds.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from duoserve.batching.next_work import Traffic
from duoserve.batching.traffic import as_running, as_running_prefill, as_waiting
from duoserve.errors import IntegrityError
from duoserve.kv_cache import PAGE_TOKENS, PagedKVCache
from duoserve.passes import Passes
from duoserve.request import Request
from duoserve.sampling import Sampler


class Roster:
    """Each request on it is ``waiting``, ``decoding``, or in the prefill of ``passes``.

    It has a sampler, and pages of ``cache`` once it has started. ``num_sent_back`` counts how often a request had to
    give up its pages to requests that had started before it.
    """

    def __init__(self, passes: Passes, cache: PagedKVCache, vocab_size: int, clock: Callable[[], float]) -> None:
        self.waiting: list[Request] = []
        self.decoding: list[Request] = []
        self.num_sent_back = 0
        self._passes = passes
        self._cache = cache
        self._vocab_size = vocab_size
        self._clock = clock
        self._samplers: dict[Request, Sampler] = {}

    @property
    def started(self) -> list[Request]:
        """The requests that decode, and those that are being prefilled."""
        prefill = self._passes.prefill
        return [*self.decoding, *(() if prefill is None else prefill.requests)]

    @property
    def everyone(self) -> list[Request]:
        """All requests on it, also those that an interrupt has left neither waiting nor started."""
        return list(self._samplers)

    def join(self, request: Request) -> None:
        """Puts a new request behind those that wait."""
        self._samplers[request] = Sampler(request.params, self._vocab_size, request.prompt_ids)
        self.waiting.append(request)

    def take(self, indices: Sequence[int], answer_room: int) -> list[Request]:
        """Takes the requests at ``indices`` of ``waiting``, which are prefilled next, and gives them pages.

        The pages are for ``answer_room`` tokens beyond those that a request has.
        """
        chosen = [self.waiting[index] for index in indices]
        for request in chosen:
            self.waiting.remove(request)
            self._cache.reserve(request.kv, request.room(answer_room))
        return chosen

    def prefilled(self, requests: Sequence[Request]) -> None:
        """Moves requests whose prefill has ended to ``decoding``."""
        self.decoding += requests

    def sample(self, request: Request, logits_V: Tensor) -> int:
        """The next token of ``request``; errors as in Sampler."""
        return self._samplers[request](logits_V)

    def make_room(self) -> list[Request]:
        """Reserves room for each decoding request's next token, and returns these requests.

        If the cache is full, the requests that started last are sent back to wait.
        """
        for request in list(self.decoding):
            while request in self.decoding and request.num_known > request.kv.room + self._cache.free_tokens:
                self._make_way()
            if request in self.decoding:
                self._cache.reserve(request.kv, request.num_known)
        return list(self.decoding)

    def abort(self, request: Request) -> None:
        """Ends a request; does nothing to one that is not on it.

        Its pages are free at once, except if its prompt is in a pass with others, as that pass still writes to them.
        """
        if request not in self._samplers:
            return
        request.finish("abort")
        prefill = self._passes.prefill
        if prefill is None or request not in prefill.requests:
            self.release([request])
        elif all(other.finish_reason for other in prefill.requests):
            self._passes.abandon(prefill)
            self.release(prefill.requests)

    def release(self, requests: Iterable[Request]) -> None:
        """Removes requests that have ended, and frees what they hold."""
        for request in requests:
            self._cache.release(request.kv)
            for those in (self.waiting, self.decoding):
                if request in those:
                    those.remove(request)
            del self._samplers[request]  # last: an interrupt leaves no request that cannot be aborted

    def traffic(self, answer_room: int, measured: float) -> Traffic:
        """All that decides what to do next; ``measured`` is as in Traffic.

        Waiting requests will start with room for ``answer_room`` tokens more than they have.
        """
        waiting = [as_waiting(request, answer_room) for request in self.waiting]
        return self.started_traffic(measured)._replace(waiting=waiting)

    def started_traffic(self, measured: float) -> Traffic:
        """The traffic without the requests that wait, of which there may be many."""
        # One page is kept for each request that may grow: else the next one that does would send a newcomer back.
        growing = sum(request.may_grow for request in self.decoding)
        free = self._cache.free_tokens - growing * PAGE_TOKENS
        prefill = self._passes.prefill
        running_prefill = None if prefill is None else as_running_prefill(prefill, self._passes.num_layers)
        return Traffic(self._clock(), (), [*map(as_running, self.decoding)], free, running_prefill, measured)

    def check_integrity(self) -> None:
        """Raises IntegrityError if pages outlive their requests, or if a request has no sampler."""
        started = self.started
        self._cache.check_integrity([request.kv for request in started])
        known = [*self.waiting, *started]
        if len(known) != len(self._samplers) or not all(request in self._samplers for request in known):
            raise IntegrityError(f"{len(known)} requests wait or run, but {len(self._samplers)} have samplers")

    def _make_way(self) -> None:
        """Sends back the requests of the prefill that is under way, or else the decoding one that started last."""
        prefill = self._passes.prefill
        if prefill is None:
            self._send_back(self.decoding.pop())
            return
        self._passes.abandon(prefill)
        for request in prefill.requests:
            if request.finish_reason is None:
                self._send_back(request)
            else:
                self.release([request])

    def _send_back(self, request: Request) -> None:
        """Takes the request's pages and lets it wait for room again.

        Behind its prompt, its tokens so far will be computed anew by decode steps: a longer prompt would be faster, but
        would have other bits.
        """
        self._cache.release(request.kv)
        self.num_sent_back += 1
        if request.first_token is not None:  # else it goes on waiting as it did
            request.sent_back = self._clock()
        self.waiting.append(request)
