"""The process that renders chat templates. It imports nothing of duoserve, and may be killed at any time.

A template comes with a checkpoint, so it is an untrusted program: it runs in jinja2's sandbox, which keeps it from
Python, and in this process, whose memory is bounded, so that it cannot use up the service's.

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
    """``{% generation %}`` marks what an assistant has said; only training uses the marks, so they are dropped."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment of templates, with the filters and functions that transformers gives them."""
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
    """JSON that is not escaped for HTML, unlike that of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """Raises an error; templates call it to refuse messages."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The current date, which some templates put into the prompt."""
    return datetime.now().strftime(form)


def answer(made: ImmutableSandboxedEnvironment, line: str) -> dict[str, str]:
    """The answer to one request."""
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
    """Answers requests until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    made = environment()
    for line in sys.stdin:
        print(json.dumps(answer(made, line)), flush=True)


if __name__ == "__main__":
    main()
