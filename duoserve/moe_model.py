"""``MoEModel``: the public face. A checkpoint goes in, text comes out; what moves in between is the scheduler's affair.

T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import reprlib
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from torch import Tensor

from duoserve.config import EngineConfig, ModelConfig
from duoserve.errors import ClosedError, RequestError
from duoserve.experts.budget import MemoryPlan
from duoserve.experts.hub import at_revision
from duoserve.interface import FinishReason
from duoserve.loading import Runtime, load
from duoserve.metrics import Stats
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.predictor import Predictor
from duoserve.text.chat_template import ChatTemplate
from duoserve.text.tokenizer import Text
from duoserve.text.writer import Writer

Prompt = str | Sequence[int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Completion:
    """What a prompt became. ``text`` is None when the checkpoint has no tokenizer; ``finish_reason`` is "stop" (an end
    token, which is in ``token_ids`` alone, or a stop string) or "length"; ``stats`` covers the call that made it.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats


class MoEModel:
    """A Mixture-of-Experts model with some of its experts in fast memory. Make one with :meth:`from_pretrained`.

    One request runs at a time: other threads wait their turn. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._open_runtime: Runtime | None = runtime
        self._turn_ends = threading.Condition()  # or the model is closed, which need not end a turn
        self._computing = threading.RLock()  # held for a step at a time: a stream that nobody reads holds up no close()
        self._serving_thread: int | None = None
        self._tokens: Generator[tuple[Request, int]] | None = None  # of the call that has its turn
        self._lent = False

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - each is a knob that users turn by name
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        expert_memory: int | str | None = None,
        expert_slots: int | str | None = None,
        memory: int | str | None = None,
        host_memory: int | str = "auto",
        policy: str | Policy = "auto",
        predictor: Predictor | str | Path | None = None,
        max_context: int | None = None,
        copy_threads: int = 2,
        decode_mode: str = "auto",
        quantize: str | None = None,
        invariant: bool = False,
        cache_dir: str | Path | None = None,
    ) -> MoEModel:
        """Loads a folder, a hub id, or an embedded model ("bard", "bard-fine").

        ``revision`` is a hub id's branch, tag or commit, as in "owner/name@revision".

        At most one of these bounds fast memory: ``expert_slots`` (a count, or a share of all experts such as "25%"),
        ``expert_memory`` (the slot pool) or ``memory`` (slots, dense weights, KV cache and workspace); with none of
        them, as many experts as comfortably fit. Memory is bytes or text such as "4GiB". ``host_memory`` bounds the
        packed experts that wait in RAM; the others stay on disk ("auto" on a CPU: all of them). On a GPU ``memory``
        counts one calling thread: cuBLAS takes up to 64 MiB more for each further one.
        ``policy`` is a name or a :class:`Policy`; those that copy ahead in decode do what ``predictor`` says (a file of
        train-predictor's, or "auto": the one beside the model); "auto" is what ``duoserve evaluate`` has chosen, with
        its predictor. ``max_context`` counts tokens over all running sequences; ``cache_dir`` is where a packed copy of
        the experts is made on first use. On a GPU, ``decode_mode`` says how a decode step is launched: as one graph
        ("graph", where all experts are in pinned RAM, or in slots under "resident"), or layer by layer ("event");
        "auto" measures which suits the link. On a CPU with a C++ compiler, "compiled" makes faster prompts, and faster
        steps for up to 16 requests; that takes some seconds more when it is loaded, and when there first are several.
        ``quantize`` "int8" or "int4" makes experts smaller that the checkpoint has in floats, and less exact; "bf12"
        makes bfloat16 ones a quarter smaller, and keeps every bit; all else stays as it is. ``invariant`` gives a
        request the same bits alone and in any batch, on a CPU, at the price of decode steps that multiply row by row.

        Raises ConfigError, CheckpointError, MemoryBudgetError or, of a predictor that is not there or of another model,
        TraceError before anything large is allocated; CopyError if an expert cannot be brought or made smaller.
        """
        wanted = EngineConfig.of(
            device=device,
            dtype=dtype,
            expert_memory=expert_memory,
            expert_slots=expert_slots,
            memory=memory,
            host_memory=host_memory,
            max_context=max_context,
            copy_threads=copy_threads,
            decode_mode=decode_mode,
            quantize=quantize,
            invariant=invariant,
        )
        return cls(load(at_revision(model, revision), wanted, policy, cache_dir, predictor=predictor))

    @property
    def config(self) -> ModelConfig:
        """The model's hyper-parameters."""
        return self._runtime.config

    @property
    def memory(self) -> MemoryPlan:
        """What the memory was divided into when the model was loaded."""
        return self._runtime.plan

    @property
    def text(self) -> Text | None:
        """The checkpoint's tokenizer, None where it has none."""
        return self._runtime.text

    @property
    def max_context(self) -> int:
        """Tokens of the longest request, prompt and output: what the KV cache holds and the model has positions for."""
        return self._runtime.engine.max_context

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, None where it has none."""
        return self._runtime.chat_template

    @property
    def policy(self) -> str:
        """The name of the policy in force."""
        return self._runtime.policy.name

    @property
    def stats(self) -> Stats:
        """Figures of the last call, or of the running one so far."""
        return self._runtime.meter.snapshot()

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = None, **changes: Any) -> Completion: ...

    @overload
    def generate(self, prompt: Sequence[int], params: SamplingParams | None = None, **changes: Any) -> Completion: ...

    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], params: SamplingParams | None = None, **changes: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **changes: Any,
    ) -> Completion | list[Completion]:
        """Completes one prompt (text or token ids), or a list of prompts in shared passes over the experts.

        ``changes`` override fields of ``params``. Raises RequestError for what cannot be served, CopyError when an
        expert cannot be brought, MemoryBudgetError when memory is refused; the model stays usable after any of them.
        """
        single = _is_one(prompt)
        prompts: Sequence[Any] = [prompt] if single else prompt
        settings = _settings(params, changes)
        text = self._runtime.text
        writers = {Request(self.encode(one), settings): Writer(text, settings.stop) for one in prompts}
        if not writers:
            return []
        stats = _result(self._run(writers))
        done = [_completion(request, writer, stats) for request, writer in writers.items()]
        return done[0] if single else done

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **changes: Any
    ) -> Generator[str, None, Completion]:
        """Completes one prompt, yielding text as soon as it is certain; needs a tokenizer.

        What the generator returns (``value`` of its StopIteration) is the whole.
        """
        settings = _settings(params, changes)
        if self._runtime.text is None:
            raise RequestError("stream() yields text, but this checkpoint has no tokenizer.json: use generate()")
        request = Request(self.encode(prompt), settings)
        return self._stream(request, Writer(self._runtime.text, settings.stop))

    def _stream(self, request: Request, writer: Writer) -> Generator[str, None, Completion]:
        stats = yield from self._run({request: writer})
        if piece := writer.rest(request):
            yield piece
        return _completion(request, writer, stats)

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """One prefill: float32 logits [T, V] of every position."""
        with self._my_turn() as runtime, self._step():
            return runtime.engine.forward(_token_ids(token_ids))

    @contextmanager
    def lend(self) -> Iterator[Runtime]:
        """The parts, for a service that is made in the block and runs the engine itself until the model is closed.

        Waits for a call that runs; others wait for the block, and are refused from then on, unless it has raised.
        RequestError if another service has the model.
        """
        with self._my_turn() as runtime:
            yield runtime
            self._lent = True

    def close(self) -> None:
        """Releases threads, files and memory; calling it again does nothing.

        It waits for the step that another thread computes, whose call then raises ClosedError, or for its ``forward``,
        which comes to its end. Those who wait for their turn get ClosedError.
        """
        with self._turn_ends:
            runtime, self._open_runtime = self._open_runtime, None
            self._turn_ends.notify_all()
        if runtime is not None:
            with self._computing, closing(runtime):
                if self._tokens is not None and inspect.getgeneratorstate(self._tokens) != inspect.GEN_RUNNING:
                    self._tokens.close()  # a stream that nobody reads on would hold the engine

    def __enter__(self) -> MoEModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _runtime(self) -> Runtime:
        if self._open_runtime is None:
            raise ClosedError("this model was closed; load it again with MoEModel.from_pretrained")
        return self._open_runtime

    def _run(self, writers: Mapping[Request, Writer]) -> Generator[str, None, Stats]:
        """Yields text as it becomes certain, and returns the figures as they are before another call has its turn."""
        with self._my_turn() as runtime:
            meter, tokens = runtime.meter, runtime.engine.generate(list(writers))
            del runtime  # close() releases it, however long this waits to be read
            self._tokens = tokens
            try:
                while (made := self._next(tokens)) is not None:
                    request, token = made
                    if piece := writers[request].push(request, token):
                        yield piece
            finally:
                with self._computing:
                    tokens.close()
                    self._tokens = None
            return meter.snapshot()

    def _next(self, tokens: Generator[tuple[Request, int]]) -> tuple[Request, int] | None:
        with self._step():
            return next(tokens, None)

    @contextmanager
    def _step(self) -> Iterator[None]:
        """While it lasts nobody closes the model; ClosedError if somebody has."""
        with self._computing:
            _ = self._runtime
            yield

    @contextmanager
    def _my_turn(self) -> Iterator[Runtime]:
        if self._serving_thread == threading.get_ident():
            raise RequestError("this thread's earlier stream is still open: exhaust it or call its close() first")
        with self._turn_ends:
            self._turn_ends.wait_for(lambda: self._serving_thread is None or self._open_runtime is None)
            if self._lent:
                raise RequestError("a service runs this model: submit requests to it")
            self._serving_thread = threading.get_ident()
        try:
            yield self._runtime
        finally:
            with self._turn_ends:
                self._serving_thread = None
                self._turn_ends.notify_all()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; RequestError for text that cannot be encoded, or without a tokenizer. Any thread."""
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self._runtime.text is None:
            raise RequestError("the prompt is text, but this checkpoint has no tokenizer.json: give token ids")
        return self._runtime.text.encode(prompt)


def _result(generator: Generator[object, None, Result]) -> Result:
    """What it returns, whatever it yields before."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            result: Result = end.value
            return result


def _completion(request: Request, writer: Writer, stats: Stats) -> Completion:
    text = writer.finish(request)  # which may find out why it ended
    return Completion(text, request.output_ids, request.finish_reason or "length", stats)


def _is_one(prompt: Any) -> bool:
    """Whether it is one prompt, and not a list of them; RequestError for what is neither."""
    if isinstance(prompt, (str, bytes)):
        return True
    try:
        return len(prompt) > 0 and _is_integer(prompt[0])
    except (TypeError, LookupError) as error:
        raise _no_prompt(prompt) from error


def _token_ids(prompt: Any) -> list[int]:
    """Integers of any kind, numpy's and torch's too. Bytes are a sequence of these, but not of tokens."""
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise _no_prompt(prompt)
    try:
        return [index(token) for token in prompt]
    except TypeError as error:
        raise _no_prompt(prompt) from error


def _is_integer(value: Any) -> bool:
    """A scalar: a tensor of one element would pass for an index too."""
    return isinstance(value, Integral) or getattr(value, "ndim", 1) == 0


def _no_prompt(prompt: object) -> RequestError:
    return RequestError(f"a prompt must be text or token ids, and not {reprlib.repr(prompt)}")


def _settings(params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params is {params!r}, but must be SamplingParams; single fields go by name")
    known = SamplingParams.__dataclass_fields__
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise RequestError(f"unknown sampling parameter {unknown[0]!r}; known are {', '.join(known)}")
    return replace(params or SamplingParams(), **changes)
