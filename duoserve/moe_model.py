"""``MoEModel``, the public face: a checkpoint goes in, and text comes out.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from torch import Tensor

from duoserve.config import EngineConfig, ModelConfig
from duoserve.errors import RequestError
from duoserve.experts.budget import MemoryPlan
from duoserve.experts.hub import at_revision
from duoserve.interface import FinishReason
from duoserve.loading.load import Runtime, load
from duoserve.metrics import Stats
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.predictor import Predictor
from duoserve.text.chat_template import ChatTemplate
from duoserve.text.prompts import Prompt, as_token_ids, encode, is_one
from duoserve.text.tokenizer import Tokenizer
from duoserve.text.writer import Writer
from duoserve.turns import Turns

Result = TypeVar("Result")


@dataclass(frozen=True)
class Completion:
    """The answer to a prompt. ``text`` is None if the checkpoint has no tokenizer. ``finish_reason`` is "length" or
    "stop": a stop string, or an end token, which is in ``token_ids`` but not in ``text``. ``stats`` are of the whole
    call.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats


class MoEModel:
    """A Mixture-of-Experts model with some of its experts in fast memory. Make one with :meth:`from_pretrained`.

    One call runs at a time, and other threads wait for their turn. Use it as a context manager, or call :meth:`close`.
    What a model holds that nobody refers to any more is released too, once its copy threads have been idle for a while.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._turns = Turns(runtime)

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

        At most one of these caps fast memory. Without any, there are as many slots as fit into 80 % of the free memory
        together with all else. Sizes are bytes, or text such as "4GiB".

        - ``expert_slots``: the number of slots, or a share of all experts such as "25%";
        - ``expert_memory``: the bytes of all slots together;
        - ``memory``: everything on the device: slots, dense weights, KV cache, workspace. On a GPU this counts one
          calling thread; cuBLAS takes up to 64 MiB more for each further thread.

        The other options:

        - ``revision``: a hub id's branch, tag or commit, as in "owner/name@revision".
        - ``device``: "cpu", "cuda", or "auto": a GPU if there is one.
        - ``dtype``: "float32", "float16" or "bfloat16", for weights that are not quantized, or "auto": the
          checkpoint's.
        - ``host_memory``: RAM for packed experts, in addition to the cap; the other experts stay on disk. "auto": none
          on a CPU, 80 % of the free RAM with a GPU.
        - ``policy``: a name, a :class:`Policy`, or "auto": "resident" if every expert has a slot, else what ``duoserve
          evaluate`` recommends for this model, with its predictor, else "duoserve".
        - ``predictor``: a file that ``duoserve train-predictor`` wrote, a :class:`Predictor`, or "auto": the file
          beside the model. Only policies that guess in decode use it. None: the predictor that policy "auto" brings,
          else no guesses.
        - ``max_context``: the tokens of the KV cache, over all running sequences; None: as many as the model has
          positions, at most 4096.
        - ``copy_threads``: threads that bring experts into slots while the model computes.
        - ``decode_mode``: on a GPU "graph" (a decode step is one CUDA graph, which takes all experts in pinned RAM, or
          in slots under "resident"), "event" (layer by layer) or "auto" (whichever suits the measured link). On a CPU
          "auto" (op by op) or "compiled", which needs a C++ compiler: prompts, and steps of up to 16 requests, are
          faster, for some more seconds when the model is loaded and when several requests first run at once.
        - ``quantize``: stores experts that the checkpoint has in floats, and nothing else, in a smaller format. "int8"
          and "int4" are less exact; "bf12" makes bfloat16 experts about a quarter smaller and keeps every bit.
        - ``invariant``: a request has the same bits alone and in any batch. On a CPU only; decode steps then multiply
          row by row, which takes longer.
        - ``cache_dir``: where experts are packed on first use, unless all have slots or wait in RAM, and where
          recommendations of ``duoserve evaluate`` may lie; None: ``$DUOSERVE_CACHE``, else ``~/.cache/duoserve``.

        Raises ConfigError, CheckpointError or MemoryBudgetError, TraceError if the predictor is missing or of another
        model, and CopyError if an expert cannot be brought or quantized. What can be known before anything large is
        allocated is raised before.
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
        """How memory was divided when the model was loaded."""
        return self._runtime.plan

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, None if it has none."""
        return self._runtime.tokenizer

    @property
    def max_context(self) -> int:
        """Tokens of the longest request, prompt and output: what the KV cache holds and the model has positions for."""
        return self._runtime.engine.limits.max_context

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, None if it has none."""
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

        The answer to a text keeps the space before its first word, so that prompt + answer is a text; the answer to
        token ids, such as those of a chat, begins a text of its own.

        ``changes`` override fields of ``params``. Raises RequestError for what cannot be served, CopyError if an
        expert cannot be brought, MemoryBudgetError if memory is refused; the model stays usable after each of them.
        """
        single = is_one(prompt)
        prompts: Sequence[Any] = [prompt] if single else prompt
        params = _with_changes(params, changes)
        writers = dict(self._request(one, params) for one in prompts)
        if not writers:
            return []
        stats = _exhaust(self._pieces(writers))
        done = [_completion(request, writer, stats) for request, writer in writers.items()]
        return done[0] if single else done

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **changes: Any
    ) -> Generator[str, None, Completion]:
        """Completes one prompt as ``generate`` does, yielding text as soon as it is certain; needs a tokenizer.

        The finished Completion is the generator's return value (``StopIteration.value``). Any thread may read on. Until
        the stream has ended or is closed, calls of the thread that read last raise RequestError, and others wait.
        """
        params = _with_changes(params, changes)
        if self._runtime.tokenizer is None:
            raise RequestError("stream() yields text, but this checkpoint has no tokenizer.json: use generate()")
        return self._stream(*self._request(prompt, params))

    def _request(self, prompt: Prompt, params: SamplingParams) -> tuple[Request, Writer]:
        prompt_ids = self.encode(prompt)
        behind = prompt_ids if isinstance(prompt, str) else ()
        return Request(prompt_ids, params), Writer(self._runtime.tokenizer, params.stop, behind)

    def _stream(self, request: Request, writer: Writer) -> Generator[str, None, Completion]:
        stats = yield from self._pieces({request: writer})
        if piece := writer.rest(request):
            yield piece
        return _completion(request, writer, stats)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt; may be called from any thread.

        Raises RequestError for text that cannot be encoded, or if there is no tokenizer.
        """
        return encode(self._runtime.tokenizer, prompt)

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """One prefill: float32 logits [T, V] of every position."""
        with self._turns.turn() as runtime:
            return self._turns.step(lambda: runtime.engine.forward(as_token_ids(token_ids)))

    @contextmanager
    def lend(self) -> Iterator[Runtime]:
        """Hands the runtime to a service. Build the service inside the block.

        If the block ends without an error, only the service runs the engine until the model is closed, and
        ``generate``, ``stream`` and ``forward`` raise RequestError. If the block raises, the model stays usable. Waits
        for a running call; calls that come meanwhile wait for the block. Raises RequestError if another service has
        the model.
        """
        with self._turns.lend() as runtime:
            yield runtime

    def close(self) -> None:
        """Releases threads, files and memory; calling it again does nothing.

        Waits for the step that another thread's call computes, after which that call raises ClosedError, or for the
        end of its ``forward``. Calls that wait for their turn raise ClosedError. A service is ended first, and its
        requests end with ClosedError.
        """
        self._turns.close()

    def __enter__(self) -> MoEModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _runtime(self) -> Runtime:
        return self._turns.runtime

    def _pieces(self, writers: Mapping[Request, Writer]) -> Generator[str, None, Stats]:
        """Yields text as it becomes certain; returns the figures, taken before another call has its turn."""
        meter = self._runtime.meter
        with self._turns.tokens(list(writers)) as tokens:
            for request, token in tokens:
                if piece := writers[request].push(request, token):
                    yield piece
            return meter.snapshot()


def _exhaust(generator: Generator[object, None, Result]) -> Result:
    """Runs ``generator`` to its end and gives what it returns; what it yields is dropped."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            result: Result = end.value
            return result


def _completion(request: Request, writer: Writer, stats: Stats) -> Completion:
    text = writer.finish(request)  # before finish_reason is read: this may find a stop string
    return Completion(text, request.output_ids, request.finish_reason or "length", stats)


def _with_changes(params: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"params is {params!r}, but must be SamplingParams; single fields go by name")
    known = SamplingParams.__dataclass_fields__
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise RequestError(f"unknown sampling parameter {unknown[0]!r}; known are {', '.join(known)}")
    return replace(params or SamplingParams(), **changes)
