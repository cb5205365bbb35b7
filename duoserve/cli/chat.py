"""``duoserve chat``: a conversation on the terminal, by the checkpoint's own template."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from duoserve.chat_template import ChatTemplate
from duoserve.cli.generate import add_sampling, folder_with_text, sampling
from duoserve.cli.options import MODEL_HELP, Subparsers, add_loading, add_parser, loading
from duoserve.errors import RequestError
from duoserve.moe_model import MoEModel
from duoserve.sampling import SamplingParams

EXAMPLES = """\
  duoserve chat ./my-mixtral-instruct --memory 12GiB
  duoserve chat Qwen/Qwen3-30B-A3B --system "Answer in one sentence." --temperature 0.7
"""
RESET, EXIT = "/reset", "/exit"


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "chat", f"talk with a model; {RESET} forgets, {EXIT} ends", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    add_sampling(parser)
    add_loading(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Answers line after line of stdin. A model that cannot chat is refused before it is loaded."""
    params = sampling(args)
    folder = folder_with_text(args.model)
    if ChatTemplate.load(folder) is None:
        raise RequestError(f"{args.model} has no chat template: use duoserve generate, which continues plain text")
    with MoEModel.from_pretrained(folder, **loading(args)) as model:
        _converse(model, args.system, params)


def _converse(model: MoEModel, system: str | None, params: SamplingParams) -> None:
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    for line in _lines():
        if line == EXIT:
            return
        if line == RESET:
            messages = list(start)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            messages = [*asked, {"role": "assistant", "content": _answer(model, asked, params)}]
        except RequestError as error:
            print(f"duoserve: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """What is said, without empty lines; the prompt is shown where somebody sees it."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise RequestError(f"what stdin says is not {error.encoding} text: {error.reason}") from error
        if line:
            yield line


def _answer(model: MoEModel, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Streams the answer and returns it. The template writes special tokens itself."""
    assert model.chat_template is not None and model.text is not None
    prompt_ids = model.text.encode(model.chat_template.render(messages), add_special=False)
    pieces = []
    for piece in model.stream(prompt_ids, params):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
