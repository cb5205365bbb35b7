"""Forward passes: decode steps, and prefills between whose layers decode steps may come.

T tokens, B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from duoserve.config import Phase
from duoserve.kv_cache import NewTokens, PagedKVCache, SequenceKV
from duoserve.metrics import Meter
from duoserve.models.tap import LatePass, RoutingTap
from duoserve.models.transformer import PartialPass, Transformer
from duoserve.request import Request
from duoserve.torch_modes import inference


class StepScheduler(Protocol):
    """The part of the scheduler that passes use: they tell it when each pass begins, pauses, resumes and ends."""

    def begin(self, phase: Phase, num_tokens: int) -> None: ...

    def end(self) -> None: ...

    def set_aside(self) -> None: ...

    def resume(self) -> None: ...

    def give_up_aside(self) -> None: ...

    def end_all(self) -> None: ...

    def check_integrity(self) -> None: ...


class DecodeStep(Protocol):
    """Computes a decode step instead of the model. The logits have the model's bits, unless the step is compiled."""

    def __call__(self, new_tokens: NewTokens) -> Tensor:
        """Takes one new token of each of B sequences; gives float32 logits [B, V] on the host, a row a sequence."""
        ...


class StepRunner(DecodeStep, Protocol):
    """Computes decode steps of every size instead of the model."""

    def prepare(self, num_sequences: int) -> None:
        """Records or compiles now what the first steps of up to ``num_sequences`` sequences would have to wait for."""
        ...


@dataclass(eq=False)
class Prefill:
    """The prompts of ``requests`` in one pass.

    ``late`` keeps the routing until the pass has ended; it is None unless decode steps may interrupt the pass and there
    is a listener. While the prefill is ``paused``, decode steps have the scheduler.
    """

    requests: list[Request]
    new_tokens: NewTokens
    partial: PartialPass
    late: LatePass | None
    paused: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return len(self.new_tokens.token_ids)


class Passes:
    """Runs the passes of ``model``. One prefill may be under way at a time, with decode steps between its layers.

    ``tap`` is given if there are listeners to the routers; it hears each pass as a whole, with no other in between.
    ``runner``, if given, computes the decode steps.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: Transformer,
        scheduler: StepScheduler,
        cache: PagedKVCache,
        meter: Meter,
        *,
        tap: RoutingTap | None = None,
        runner: StepRunner | None = None,
    ) -> None:
        self.num_layers = len(model.layers)
        self._model = model
        self._scheduler = scheduler
        self._cache = cache
        self._meter = meter
        self._tap = tap
        self._runner = runner
        self._prefill: Prefill | None = None

    @property
    def prefill(self) -> Prefill | None:
        """The prefill that has begun and not ended."""
        return self._prefill

    @inference()
    def prepare(self, num_sequences: int) -> None:
        """Makes decode steps of up to ``num_sequences`` requests ready, so that the first of them need not wait."""
        if self._runner is not None:
            self._runner.prepare(num_sequences)

    @inference()
    def whole(self, number: int, kv: SequenceKV, token_ids: Sequence[int]) -> Tensor:
        """A prefill in one go: float32 logits [T, V] of every position."""
        self._announce(Phase.PREFILL, [(number, token_ids)])
        new_tokens = self._cache.extend([(kv, token_ids)])
        return self._pass(Phase.PREFILL, new_tokens, None)

    @inference()
    def decode(self, requests: Sequence[Request]) -> Tensor:
        """Takes one token of each of B requests through the model; gives float32 logits [B, V] of the next tokens.

        The token is a request's last one or, while a request that was sent back catches up, an earlier one. A prefill
        that is under way is paused.
        """
        fresh = [(request.kv, request.next_ids) for request in requests]
        if self._prefill is not None and not self._prefill.paused:
            self._scheduler.set_aside()
            self._prefill.paused = True
        self._announce(Phase.DECODE, [(request.number, request.next_ids) for request in requests])
        new_tokens = self._cache.extend(fresh)
        return self._pass(Phase.DECODE, new_tokens, new_tokens.last_rows)

    @inference()
    def start_prefill(self, requests: list[Request], interruptible: bool) -> Prefill:
        """Begins a pass over the prompts; decode steps may come between its layers if it is ``interruptible``."""
        rows = [(request.number, request.prompt_ids) for request in requests]
        new_tokens = self._cache.extend([(request.kv, request.prompt_ids) for request in requests])
        late = LatePass(Phase.PREFILL, _rows(rows)) if interruptible and self._tap is not None else None
        if late is None:
            self._announce(Phase.PREFILL, rows)
        with self._meter.compute():
            partial = self._model.start(self._cache.batch(new_tokens))
            self._scheduler.begin(Phase.PREFILL, len(new_tokens.token_ids))
        self._prefill = Prefill(requests, new_tokens, partial, late)
        return self._prefill

    @inference()
    def advance(self, prefill: Prefill, num_layers: int) -> Tensor | None:
        """Computes the next layers of a prefill; after the last, gives float32 logits [B, V] of each prompt's end."""
        if prefill.late is not None and self._tap is not None:
            self._tap.follow(prefill.late)
        logits_BV = None
        try:
            with self._meter.compute():
                self._go_on(prefill)
                self._model.advance(prefill.partial, num_layers)
                if prefill.partial.next_layer == self.num_layers:
                    logits_BV = self._model.finish(prefill.partial, prefill.new_tokens.last_rows).cpu()
        except BaseException:
            self.abandon(prefill)
            raise
        if logits_BV is not None:
            self._end(prefill)
            if prefill.late is not None and self._tap is not None:
                self._tap.deliver(prefill.late)
        return logits_BV

    def abandon(self, prefill: Prefill) -> None:
        """Drops a prefill that has not come to its last layer. Does nothing if it has ended."""
        if self._prefill is not prefill:
            return
        if prefill.paused:
            self._prefill = None
            self._scheduler.give_up_aside()
        else:
            self._end(prefill)

    def end_all(self) -> None:
        """Drops all passes under way. After an interrupt the scheduler may have one that is not noted here."""
        self._scheduler.end_all()
        self._prefill = None

    def check_integrity(self) -> None:
        """Raises IntegrityError if the books of the slots disagree, or if a hold has outlived its pass."""
        self._scheduler.check_integrity()

    def _go_on(self, prefill: Prefill) -> None:
        if prefill.paused:
            prefill.paused = False
            self._scheduler.resume()

    def _end(self, prefill: Prefill) -> None:
        self._prefill = None
        self._scheduler.end()

    def _pass(self, phase: Phase, new_tokens: NewTokens, rows: list[int] | None) -> Tensor:
        with self._meter.compute():
            self._scheduler.begin(phase, len(new_tokens.token_ids))
            try:
                if phase is Phase.DECODE and self._runner is not None:
                    return self._runner(new_tokens)
                return self._model(self._cache.batch(new_tokens), rows).cpu()
            finally:
                self._scheduler.end()

    def _announce(self, phase: Phase, fresh: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Tells the tap which request each row of the coming pass belongs to."""
        if self._tap is not None:
            self._tap.begin(phase, _rows(fresh))


def _rows(fresh: Iterable[tuple[int, Sequence[int]]]) -> np.ndarray:
    return np.array([number for number, tokens in fresh for _ in tokens], dtype=np.int64)
