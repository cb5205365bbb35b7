"""The JSON of answers, whole or in chunks, in the dialects of both endpoints, with log-probabilities in their form."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from duoserve.interface import Piece, TokenLogprobs
from duoserve.server.token_text import TokenText
from duoserve.text.channels import Channels
from duoserve.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True)
class Head:
    """The fields that all chunks of an answer share."""

    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))


class ChoiceWriter(Protocol):
    """Writes one choice of an answer."""

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """The choice's next chunks, the last of which brings the piece."""
        ...

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The choice as part of an answer that is given at once."""
        ...


class Dialect(Protocol):
    """The form of one endpoint's answers."""

    @property
    def whole_object(self) -> str: ...

    @property
    def chunk_object(self) -> str: ...

    @property
    def id_prefix(self) -> str: ...

    @property
    def goes_on(self) -> bool:
        """Whether an answer is text to be put behind its prompt."""
        ...

    def writer(self, index: int, tokens: TokenText | None, prompt_ids: Sequence[int]) -> ChoiceWriter:
        """A writer of choice ``index``; ``tokens`` is None if no log-probabilities are wanted."""
        ...


class CompletionWriter:
    """Writes a choice of ``/v1/completions``."""

    def __init__(self, index: int, tokens: TokenText | None, prompt_ids: Sequence[int]) -> None:
        self._index = index
        self._tokens = tokens
        self._offsets = None if tokens is None else tokens.offsets(prompt_ids)

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """As in ChoiceWriter."""
        return [self.whole([piece])]

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The choice of ``pieces``, the last of which says how it ended."""
        return {
            "index": self._index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs([one for piece in pieces for one in piece.logprobs]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self._tokens is None or self._offsets is None:
            return None
        return {
            "tokens": [self._tokens.label(one.token_id) for one in tokens],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [_by_label((*one.top, (one.token_id, one.logprob)), self._tokens) for one in tokens],
            "text_offset": [self._offsets.next(one.token_id) for one in tokens],
        }


class ChatWriter:
    """Writes a choice of ``/v1/chat/completions``: what is said, and nothing of other channels."""

    def __init__(self, index: int, tokens: TokenText | None, channels: Channels) -> None:
        self._index = index
        self._tokens = tokens
        self._channels = channels
        self._begun = False

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """As in ChoiceWriter; the first of all chunks only names the role."""
        heard = self._heard(piece)
        brought = self._choice([heard]) | {"delta": {"content": heard.text}}
        if self._begun:
            return [brought]
        self._begun = True
        opening = {"index": self._index, "logprobs": None, "finish_reason": None}
        return [opening | {"delta": {"role": "assistant", "content": ""}}, brought]

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The choice of ``pieces``, the last of which says how it ended."""
        heard = [self._heard(piece) for piece in pieces]
        text = "".join(piece.text for piece in heard)
        return self._choice(heard) | {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _heard(self, piece: Piece) -> Piece:
        """The part of a piece that is said. A mark that ends a message may bring the last of its text."""
        said = self._channels.push(piece.token_ids)
        heard = piece if said else replace(piece, text="")
        return heard if said and self._channels.said else replace(heard, logprobs=())

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {
            "index": self._index,
            "logprobs": self._logprobs([one for piece in pieces for one in piece.logprobs]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self._tokens is None:
            return None
        entry = self._entry
        return {
            "content": [
                entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]}
                for one in tokens
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        assert self._tokens is not None
        data = self._tokens.data(token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


@dataclass(frozen=True)
class Completions:
    """The dialect of ``/v1/completions``."""

    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"
    id_prefix: str = "cmpl"
    goes_on: bool = True

    def writer(self, index: int, tokens: TokenText | None, prompt_ids: Sequence[int]) -> ChoiceWriter:
        """A writer of choice ``index``."""
        return CompletionWriter(index, tokens, prompt_ids)


@dataclass(frozen=True)
class Chat:
    """The dialect of ``/v1/chat/completions``, for a model with this tokenizer."""

    tokenizer: Tokenizer
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    id_prefix: str = "chatcmpl"
    goes_on: bool = False

    def writer(self, index: int, tokens: TokenText | None, prompt_ids: Sequence[int]) -> ChoiceWriter:
        """A writer of choice ``index``."""
        return ChatWriter(index, tokens, Channels(self.tokenizer))


def new_head(dialect: Dialect, model: str) -> Head:
    """The head of a new answer."""
    return Head(model, f"{dialect.id_prefix}-{uuid.uuid4().hex}")


def answer(head: Head, kind: str, choices: Iterable[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
    """An answer, or a chunk of one, whose object is ``kind``; it has no field for a usage of None."""
    body = {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}
    return body if usage is None else body | {"usage": usage}


def usage_of(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    total = prompt_tokens + output_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens, "total_tokens": total}


def _by_label(chosen: Sequence[tuple[int, float]], tokens: TokenText) -> dict[str, float]:
    """The log-probabilities of ``chosen`` by label, in their order; of tokens with the same label, the first counts."""
    found: dict[str, float] = {}
    for token_id, logprob in chosen:
        found.setdefault(tokens.label(token_id), _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    return max(LOWEST, logprob) if logprob == logprob else LOWEST  # noqa: PLR0124 - NaN differs from itself
