"""The process that renders chat templates. It imports nothing of duoserve, and whoever started it may kill it.

A template comes from a checkpoint, so it is a stranger's program: it runs in jinja2's sandbox, which keeps it from
Python, and in this process, whose memory is bounded, so that it takes none of the service's.

Requests and answers are lines of JSON: ``{"template", "variables"}``, then ``{"text"}`` or ``{"error"}``.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
MAX_CHARACTERS = 1 << 20


class GenerationMarks(Extension):
    """``{% generation %}`` marks what an assistant has said; only training looks at the marks."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """What templates find, as transformers has it for them."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for people: not escaped for HTML, as jinja2's own filter is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """How a template refuses messages."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The date, which some templates tell the model."""
    return datetime.now().strftime(form)


def answer(made: ImmutableSandboxedEnvironment, line: str) -> dict[str, str]:
    """What one request comes to."""
    try:
        request = json.loads(line)
        pieces, length = [], 0
        for piece in made.from_string(request["template"]).generate(**request["variables"]):
            length += len(piece)
            if length > MAX_CHARACTERS:
                return {"error": f"it writes more than {MAX_CHARACTERS} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # a template may do anything
        return {"error": f"{error}" or type(error).__name__}


def main() -> None:
    """Answers until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    made = environment()
    for line in sys.stdin:
        print(json.dumps(answer(made, line)), flush=True)


if __name__ == "__main__":
    main()
