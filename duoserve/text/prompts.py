"""From a caller's prompt, which is text or token ids, to token ids."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral
from operator import index
from typing import Any

from duoserve.errors import RequestError
from duoserve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def encode(tokenizer: Tokenizer | None, prompt: Prompt) -> list[int]:
    """The token ids of ``prompt``, by the checkpoint's tokenizer if it is text.

    Raises RequestError for what is not a prompt, for text that cannot be encoded, and for text without a tokenizer.
    """
    if not isinstance(prompt, str):
        return as_token_ids(prompt)
    if tokenizer is None:
        raise RequestError("the prompt is text, but this checkpoint has no tokenizer.json: give token ids")
    return tokenizer.encode(prompt)


def is_one(prompt: Any) -> bool:
    """Whether ``prompt`` is one prompt, and not a list of prompts; raises RequestError if it is neither."""
    if isinstance(prompt, (str, bytes)):
        return True
    try:
        return len(prompt) > 0 and _is_integer(prompt[0])
    except (TypeError, LookupError) as error:
        raise _no_prompt(prompt) from error


def as_token_ids(prompt: Any) -> list[int]:
    """A list of integers, which may be numpy's or torch's.

    Raises RequestError for bytes and booleans too, which Python takes for integers.
    """
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise _no_prompt(prompt)
    try:
        return [_id(token) for token in (prompt.tolist() if hasattr(prompt, "tolist") else prompt)]
    except TypeError as error:
        raise _no_prompt(prompt) from error


def _id(token: Any) -> int:
    if isinstance(token, bool):
        raise TypeError
    return index(token)


def _is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer and a scalar: a tensor of one element could be used as an index too.

    NumPy's strings are scalars as well.
    """
    return isinstance(value, Integral) or (getattr(value, "ndim", 1) == 0 and not isinstance(value, str))


def _no_prompt(prompt: object) -> RequestError:
    return RequestError(f"a prompt must be text or token ids, and not {reprlib.repr(prompt)}")
