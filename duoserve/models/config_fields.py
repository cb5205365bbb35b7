"""Reads hyper-parameters out of a raw ``config.json``, in the dialects of transformers 4 (the hub) and 5."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from duoserve.errors import ConfigError
from duoserve.experts.pack_format import DTYPES

MAX_TOKEN_ID = (4 << 20) - 1
_MAX_TOKEN_IDS = 1000


class Fields:
    """A typed view of one JSON object.

    Every reader takes a field's name; where the field is absent it returns ``default``, and where that is left out it
    refuses. Every refusal is a ConfigError with the field's name, its value, and what is supported.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self._raw = raw
        self._where = where

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in low..high."""
        value = self._raw.get(name, default)
        if type(value) is not int or not low <= value <= high:  # a bool is an int to isinstance
            raise self.refusal(name, f"it must be an integer in {low}..{high}")
        return value

    def optional_integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer in low..high, or None for null (and where the field and ``default`` are absent)."""
        return None if self._raw.get(name, default) is None else self.integer(name, low, high, default)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number above ``low`` and up to ``high``."""
        value = self._raw.get(name, default)
        if type(value) not in (int, float) or not low < value <= high:  # NaN fails every comparison
            raise self.refusal(name, f"it must be a number above {low:g} and up to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A JSON true or false."""
        value = self._raw.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "it must be true or false")
        return value

    def choice(self, name: str, supported: Collection[str], default: str) -> str:
        """One of the ``supported`` texts."""
        value = self._raw.get(name, default)
        if not isinstance(value, str) or value not in supported:
            raise self.refusal(name, f"supported: {', '.join(map(repr, supported))}")
        return value

    def absent(self, name: str, why: str) -> None:
        """Refuses a field that is there and not null; ``why`` says what to do."""
        if self._raw.get(name) is not None:
            raise self.refusal(name, why)

    def unquantized(self) -> None:
        """Refuses a checkpoint with a quantization_config."""
        found = self._raw.get("quantization_config")
        if found is not None:
            method = reprlib.repr(found.get("quant_method") if isinstance(found, dict) else found)
            raise ConfigError(
                f"{self._where}: quantization_config has the quant_method {method}, which is not supported yet; "
                "use the checkpoint in bfloat16, float16 or float32"
            )

    def token_ids(self, name: str, default: int) -> tuple[int, ...]:
        """One token id, a list of them, or null for none."""
        value = self._raw.get(name, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > _MAX_TOKEN_IDS or not all(type(i) is int and 0 <= i <= MAX_TOKEN_ID for i in ids):
            raise self.refusal(name, f"it must be a token id in 0..{MAX_TOKEN_ID}, a list of them, or null")
        return tuple(ids)

    def dtype(self, default: torch.dtype) -> torch.dtype:
        """The weights' dtype, from ``dtype`` or the older ``torch_dtype``; ``default`` where neither is there."""
        name = "torch_dtype" if self._raw.get("dtype") is None else "dtype"
        value = self._raw.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in DTYPES:
            raise self.refusal(name, f"supported: {', '.join(DTYPES)}")
        return DTYPES[value]

    def rope_theta(self, default: float) -> float:
        """The base of plain RoPE over whole heads, the only kind supported.

        As transformers 5 does: ``rope_scaling`` goes before ``rope_parameters``, and a rope_theta inside of it before
        the top-level one.
        """
        name = "rope_scaling" if self._raw.get("rope_scaling") else "rope_parameters"
        parameters = self._raw.get(name) or {}
        if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
            raise self.refusal(name, "supported: null, or one flat object for all layers")
        inner = Fields(parameters, f"{self._where}: {name}")
        inner.choice("rope_type" if "rope_type" in parameters else "type", ["default"], "default")
        for fields in (self, inner):
            if fields.number("partial_rotary_factor", 0, 1, 1.0) != 1:
                raise fields.refusal("partial_rotary_factor", "supported: 1.0")
        return inner.number("rope_theta", 0, 1e12, self.number("rope_theta", 0, 1e12, default))

    def refusal(self, name: str, why: str) -> ConfigError:
        """The error for a field's value; ``why`` says what is supported."""
        value = reprlib.repr(self._raw[name]) if name in self._raw else "absent"
        return ConfigError(f"{self._where}: {name} is {value}; {why}")
