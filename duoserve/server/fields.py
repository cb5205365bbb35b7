"""Reads the fields of a JSON body with their types and bounds; raises a 400 that names the field if one is wrong."""

from __future__ import annotations

import json
from typing import Any

from duoserve.number_checks import is_integer, is_number
from duoserve.server.errors import ApiError, bad

SHOWN = 60  # characters of a wrong value that a message repeats


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``; raises a 400 for anything else, such as NaN, or nesting beyond Python's depth."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad(None, f"the body is not JSON: {' '.join(str(error).split())[:SHOWN]}") from error
    if not isinstance(value, dict):
        raise bad(None, f"the body is {shown(value)}, but must be a JSON object")
    return value


class BodyFields:
    """A JSON object's fields by name; null counts as absent. Unknown fields are ignored, as OpenAI's servers do."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def raw(self, name: str) -> Any:
        """A value as it came, None if absent."""
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in ``low..high``; 3.0 counts as one."""
        value = self.raw(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (is_integer(value) and low <= value <= high):
            return value
        raise self.wrong(name, f"an integer in {low}..{high}")

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number in ``low..high``."""
        value = self.raw(name)
        if value is None or (is_number(value) and low <= value <= high):
            return value
        raise self.wrong(name, f"a number in {low:g}..{high:g}")

    def flag(self, name: str) -> bool:
        """True or false; false if absent."""
        value = self.raw(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.wrong(name, "true or false")

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.raw(name)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(name, "a string")

    def part(self, name: str) -> BodyFields:
        """The fields of an object; no fields if it is absent."""
        value = self.raw(name)
        if value is None or isinstance(value, dict):
            return BodyFields(value or {}, f"{self._prefix}{name}.")
        raise self.wrong(name, "an object")

    def refuse(self, *names: str) -> None:
        """Raises a 400 if one of these unsupported fields asks for something: null, false, 0 and empty do not."""
        for name in names:
            if self.raw(name):
                raise self._not_supported(name)

    def refuse_even_empty(self, *names: str) -> None:
        """As ``refuse``, for fields in which 0 and an empty value ask for something too; null and false do not."""
        for name in names:
            value = self.raw(name)
            if value is not None and value is not False:
                raise self._not_supported(name)

    def refuse_other(self, **done: bool | float | str | list[str]) -> None:
        """Raises a 400 if one of these fields, which are supported with one value only, has another."""
        for name, way in done.items():
            if self.raw(name) not in (None, way):
                raise self.wrong(name, f"{json.dumps(way)}: this server does nothing else")

    def _not_supported(self, name: str) -> ApiError:
        name = f"{self._prefix}{name}"
        return bad(name, f"{name} is not supported by this server: leave it out")

    def wrong(self, name: str, wanted: str) -> ApiError:
        """The 400 for a field that is not what it must be."""
        return bad(f"{self._prefix}{name}", f"{self._prefix}{name} is {shown(self.raw(name))}, but must be {wanted}")


def shown(value: object) -> str:
    """A value as a message repeats it: cut short, and made without going through all of a large value."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**SHOWN:
        return "an integer of more than 60 digits"
    text = json.dumps(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
