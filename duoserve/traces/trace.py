"""Recorded routing: the choices of a model's routers, request by request.

R requests, N tokens of all requests laid end to end, T tokens of one, K top-k, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np

from duoserve.errors import TraceError
from duoserve.scheduling.plan import ModelShape
from duoserve.scheduling.routing import Routing

# The names of a trace's tensors. Names of a layer's tensors end in its number.
REQUESTS, TOKEN_IDS = "requests", "token_ids"
IDS, WEIGHTS, LOOKAHEAD = "topk_ids", "topk_weights", "lookahead"


class Column(NamedTuple):
    """A tensor's dtype, and the shape of one row."""

    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]


@dataclass(frozen=True)
class TraceMeta:
    """The model of a trace: the checkpoint's ``fingerprint``, its MoE ``layers`` in order, and their sizes.

    ``conditions`` says in which precision it was run and how tokens were drawn; empty if that is not known.
    """

    fingerprint: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    conditions: str = ""

    @property
    def shape(self) -> ModelShape:
        """The sizes that a scheduler needs of the model."""
        return ModelShape(self.num_experts, self.top_k, self.layers)

    @property
    def ids_dtype(self) -> type[np.unsignedinteger]:
        """The smallest integer dtype that holds an expert's number."""
        return np.uint8 if self.num_experts <= 256 else np.uint16

    def of_layer(self, layer: int) -> list[str]:
        """The names of a layer's tensors, in the order of LayerTrace."""
        kinds = (IDS, WEIGHTS) if layer == self.layers[0] else (IDS, WEIGHTS, LOOKAHEAD)
        return [f"{kind}.{layer}" for kind in kinds]

    def columns(self) -> dict[str, Column]:
        """Every tensor of a trace by name. Rows are tokens; those of REQUESTS are requests.

        A request's row has its number of tokens, and how many of them are the prompt. The first MoE layer has no
        look-ahead scores, as no router comes before it.
        """
        found = {REQUESTS: Column(np.dtype(np.int32), (2,)), TOKEN_IDS: Column(np.dtype(np.int32), ())}
        chosen = Column(np.dtype(self.ids_dtype), (self.top_k,)), Column(np.dtype(np.float16), (self.top_k,))
        scores = Column(np.dtype(np.float16), (self.num_experts,))
        for layer in self.layers:
            found |= zip(self.of_layer(layer), (*chosen, scores), strict=False)
        return found

    def named(
        self, requests_R2: np.ndarray, token_ids_N: np.ndarray, layers: Mapping[int, LayerTrace]
    ) -> dict[str, np.ndarray]:
        """The tensors of a trace by name, as in ``columns``."""
        tensors = {REQUESTS: requests_R2, TOKEN_IDS: token_ids_N}
        for layer in self.layers:
            given = (tensor for tensor in layers[layer] if tensor is not None)
            tensors |= zip(self.of_layer(layer), given, strict=True)
        return tensors


class Rows(Protocol):
    """Access to a trace's tensors by rows."""

    def read(self, name: str, start: int, stop: int | None) -> np.ndarray:
        """Rows ``start`` to ``stop`` (None: the last) of the tensor ``name``."""
        ...


@dataclass(frozen=True)
class MemoryRows:
    """A trace's tensors as arrays in memory."""

    tensors: Mapping[str, np.ndarray]

    def read(self, name: str, start: int, stop: int | None) -> np.ndarray:
        return self.tensors[name][start:stop]


class LayerTrace(NamedTuple):
    """One layer's routing of many tokens; ``ahead_NE`` has the look-ahead scores for it, None for the first layer."""

    topk_ids_NK: np.ndarray
    topk_weights_NK: np.ndarray
    ahead_NE: np.ndarray | None = None


@dataclass(frozen=True)
class RequestTrace:
    """The routing of one request. Step 0 is its prompt, and every step after it one token.

    ``token_ids_T`` are the tokens that went through the model; the first ``num_prompt`` of them are the prompt.
    """

    number: int
    token_ids_T: np.ndarray
    num_prompt: int
    layers: Mapping[int, LayerTrace]

    @property
    def num_steps(self) -> int:
        """The number of steps: one for the prompt, and one for each token behind it."""
        return len(self.token_ids_T) - self.num_prompt + 1

    def routing(self, step: int) -> Iterator[Routing]:
        """What each layer's router chose in ``step``, in the order of the layers."""
        rows = self._rows(step)
        requests_T = np.full(rows.stop - rows.start, self.number, dtype=np.int64)
        layers = list(self.layers.items())
        for (layer, said), later in zip(layers, [*layers[1:], None], strict=True):
            ahead = {} if later is None else {later[0]: _float32(later[1].ahead_NE, rows)}
            ids_TK = said.topk_ids_NK[rows].astype(np.int64)
            yield Routing(layer, requests_T, ids_TK, _float32(said.topk_weights_NK, rows), ahead)

    def _rows(self, step: int) -> slice:
        if not 0 <= step < self.num_steps:
            raise TraceError(f"step {step} of a request with {self.num_steps} steps was asked for")
        return slice(self.num_prompt + step - 1, self.num_prompt + step) if step else slice(0, self.num_prompt)


def _float32(values_NX: np.ndarray | None, rows: slice) -> np.ndarray:
    assert values_NX is not None, "only the first layer has no look-ahead scores"
    return values_NX[rows].astype(np.float32)


class Trace:
    """The routing of ``len(trace)`` requests; ``trace[i]`` reads one of them, ``layer`` one layer of all."""

    def __init__(self, meta: TraceMeta, rows: Rows) -> None:
        self.meta = meta
        self._rows = rows

    @classmethod
    def in_memory(
        cls, meta: TraceMeta, requests_R2: np.ndarray, token_ids_N: np.ndarray, layers: Mapping[int, LayerTrace]
    ) -> Trace:
        """A trace of these arrays, whose dtypes are those of ``meta.columns()``."""
        return cls(meta, MemoryRows(meta.named(requests_R2, token_ids_N, layers)))

    def select(self, numbers: Sequence[int]) -> Trace:
        """The requests of these ``numbers``, in that order, as a trace of its own in memory."""
        requests = [self[number] for number in numbers]
        sizes = [(len(request.token_ids_T), request.num_prompt) for request in requests]
        return Trace.in_memory(
            self.meta,
            np.array(sizes, dtype=np.int32).reshape(-1, 2),
            np.concatenate([request.token_ids_T for request in requests]),
            {layer: joined([request.layers[layer] for request in requests]) for layer in self.meta.layers},
        )

    def __len__(self) -> int:
        return len(self.requests_R2)

    def __getitem__(self, number: int) -> RequestTrace:
        if not 0 <= number < len(self):
            raise IndexError(f"request {number} of a trace of {len(self)} requests was asked for")
        start, stop = int(self.starts_R[number]), int(self.starts_R[number + 1])
        layers = {layer: self.layer(layer, start, stop) for layer in self.meta.layers}
        num_prompt = int(self.requests_R2[number, 1])
        return RequestTrace(number, self._rows.read(TOKEN_IDS, start, stop), num_prompt, layers)

    def __iter__(self) -> Iterator[RequestTrace]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def requests_R2(self) -> np.ndarray:
        """Each request's number of tokens and how many of them are the prompt: int32 [R, 2]."""
        return self._rows.read(REQUESTS, 0, None)

    @cached_property
    def starts_R(self) -> np.ndarray:
        """The first row of each request, and the end of all rows at last: int64 [R + 1]."""
        return np.concatenate([[0], np.cumsum(self.requests_R2[:, 0], dtype=np.int64)])

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests."""
        return int(self.starts_R[-1])

    @cached_property
    def decodes_R(self) -> np.ndarray:
        """Whether each request has a step behind its prompt's: bool [R]."""
        decodes_R: np.ndarray = self.requests_R2[:, 0] > self.requests_R2[:, 1]
        return decodes_R

    def check_decodes(self) -> None:
        """Raises TraceError if no request decodes: predictors and policies are judged by decode steps."""
        if not self.decodes_R.any():
            raise TraceError(f"the trace has {len(self)} requests, and none decodes: trace more tokens")

    @cached_property
    def prompt_marks(self) -> list[str]:
        """A hash of each request's prompt, the same for that prompt in any trace."""
        token_ids_N, prompts_R = self.read(TOKEN_IDS).astype("<i4"), self.requests_R2[:, 1]
        prompts = (token_ids_N[start : start + n] for start, n in zip(self.starts_R, prompts_R, strict=False))
        return [blake2b(prompt.tobytes(), digest_size=8).hexdigest() for prompt in prompts]

    def read(self, name: str) -> np.ndarray:
        """One whole tensor, by its name in ``meta.columns()``."""
        return self._rows.read(name, 0, None)

    def chosen(self, layer: int) -> np.ndarray:
        """The experts that all tokens chose at ``layer``, [N, K]; reads nothing else of the layer."""
        return self.read(self.meta.of_layer(layer)[0])

    def layer(self, layer: int, start: int = 0, stop: int | None = None) -> LayerTrace:
        """One layer's routing of all tokens, or of rows ``start`` to ``stop``."""
        return LayerTrace(*(self._rows.read(name, start, stop) for name in self.meta.of_layer(layer)))


def joined(parts: Sequence[LayerTrace]) -> LayerTrace:
    """One layer's routing of all the tokens of ``parts``."""
    return LayerTrace(*(np.concatenate(column) for column in zip(*parts, strict=True) if column[0] is not None))
