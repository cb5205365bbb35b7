"""Reads hyper-parameters from a raw ``config.json``, in the dialects of transformers 4 (the hub) and 5."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from duoserve.errors import ConfigError
from duoserve.experts.layout import DTYPES
from duoserve.number_checks import is_integer, is_number

MAX_TOKEN_ID = (4 << 20) - 1
_MAX_TOKEN_IDS = 1000


class ConfigFields:
    """A typed view of one JSON object.

    Every reader takes a field's name. If the field is absent, it returns ``default``, or refuses if there is none. A
    refusal is a ConfigError with the field's name, its value, and what is supported.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self._raw = raw
        self._where = where

    @classmethod
    def completed(cls, raw: Mapping[str, Any], defaults: Mapping[str, Any], aliases: Mapping[str, str]) -> ConfigFields:
        """A config.json whose absent fields have the values of ``defaults``; ``aliases`` maps other names to fields.

        If a field appears under both names and one is null, the other counts.
        """
        named = dict(raw)
        for alias, name in aliases.items():
            value = named.pop(alias, None)
            if value is None:
                continue
            if named.get(name) is None:
                named[name] = value
            elif named[name] != value:
                raise cls(raw).refusal(alias, f"but {name}, its other name, is {reprlib.repr(raw[name])}")
        return cls({**defaults, **named})

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in low..high."""
        value = self._raw.get(name, default)
        if not is_integer(value) or not low <= value <= high:
            raise self.refusal(name, f"it must be an integer in {low}..{high}")
        return value

    def optional_integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer in low..high, or None for null, or if both the field and ``default`` are absent."""
        return None if self._raw.get(name, default) is None else self.integer(name, low, high, default)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number above ``low`` and up to ``high``."""
        value = self._raw.get(name, default)
        if not is_number(value) or not low < value <= high:  # NaN fails every comparison
            raise self.refusal(name, f"it must be a number above {low:g} and up to {high:g}")
        return float(value)

    def is_set(self, name: str) -> bool:
        """Whether the field is there, and neither null, zero nor empty."""
        return bool(self._raw.get(name))

    def is_null(self, name: str) -> bool:
        """Whether the field is null or absent."""
        return self._raw.get(name) is None

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """A list of integers in low..high; empty if null or absent."""
        value = [] if self._raw.get(name) is None else self._raw[name]
        if not isinstance(value, list) or not all(is_integer(n) and low <= n <= high for n in value):
            raise self.refusal(name, f"it must be a list of integers in {low}..{high}")
        return value

    def inner(self, name: str) -> ConfigFields:
        """The fields of an object that has no objects in it; empty if null or absent."""
        value = self._raw.get(name) or {}
        if not isinstance(value, dict) or any(isinstance(entry, dict) for entry in value.values()):
            raise self.refusal(name, "supported: null, or one flat object for all layers")
        return ConfigFields(value, f"{self._where}: {name}")

    def section(self, name: str) -> ConfigFields:
        """The fields of an object, which may have objects in it."""
        value = self._raw.get(name)
        if not isinstance(value, dict):
            raise self.refusal(name, "it must be an object")
        return ConfigFields(value, f"{self._where}: {name}")

    @property
    def names(self) -> list[str]:
        """The names of all fields that are there."""
        return list(self._raw)

    def only(self, *names: str) -> None:
        """Refuses any field that is not among ``names``."""
        for name in self._raw:
            if name not in names:
                raise self.refusal(name, "what it says of the weights is not known here")

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty if null or absent."""
        value = [] if self._raw.get(name) is None else self._raw[name]
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.refusal(name, "it must be a list of texts")
        return value

    def choices(self, name: str, supported: Collection[str], count: int) -> list[str]:
        """A list of ``count`` texts, all of them ``supported``; empty if null or absent."""
        value = [] if self._raw.get(name) is None else self._raw[name]
        known = isinstance(value, list) and all(isinstance(entry, str) and entry in supported for entry in value)
        if not known or len(value) not in (0, count):
            raise self.refusal(name, f"it must be a list of {count}, each {' or '.join(map(repr, supported))}")
        return list(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A JSON true or false."""
        value = self._raw.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "it must be true or false")
        return value

    def choice(self, name: str, supported: Collection[str], default: str | None = None) -> str:
        """One of the ``supported`` texts."""
        value = self._raw.get(name, default)
        if not isinstance(value, str) or value not in supported:
            raise self.refusal(name, f"supported: {', '.join(map(repr, supported))}")
        return value

    def absent(self, name: str, why: str) -> None:
        """Refuses a field that is there and not null; ``why`` says what to do."""
        if self._raw.get(name) is not None:
            raise self.refusal(name, why)

    def token_ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """One token id, a list of them, or null for none."""
        value = self._raw.get(name, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > _MAX_TOKEN_IDS or not all(is_integer(i) and 0 <= i <= MAX_TOKEN_ID for i in ids):
            raise self.refusal(name, f"it must be a token id in 0..{MAX_TOKEN_ID}, a list of them, or null")
        return tuple(ids)

    @property
    def says_dtype(self) -> bool:
        """Whether the weights' dtype is given; if not, it is that of the stored weights."""
        return not (self.is_null("dtype") and self.is_null("torch_dtype"))

    def dtype(self) -> torch.dtype:
        """The weights' dtype, from ``dtype`` or the older ``torch_dtype``; bfloat16 if neither is given."""
        if not self.says_dtype:
            return torch.bfloat16
        name = "torch_dtype" if self.is_null("dtype") else "dtype"
        value = self._raw[name]
        if not isinstance(value, str) or value not in DTYPES:
            raise self.refusal(name, f"supported: {', '.join(DTYPES)}")
        return DTYPES[value]

    def refusal(self, name: str, why: str) -> ConfigError:
        """The error for a field's value; ``why`` says what is supported."""
        value = reprlib.repr(self._raw[name]) if name in self._raw else "absent"
        return ConfigError(f"{self._where}: {name} is {value}; {why}")
