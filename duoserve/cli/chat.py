"""``duoserve chat``: a conversation on the terminal, by the checkpoint's own template."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace

from duoserve.cli.options import MODEL_HELP, Subparsers, add_loading, add_parser, loading
from duoserve.cli.sampling_options import add_sampling, folder_with_text, sampling
from duoserve.errors import RequestError
from duoserve.moe_model import Completion, MoEModel
from duoserve.sampling import SamplingParams
from duoserve.text.channels import said
from duoserve.text.chat_template import ChatTemplate

EXAMPLES = """\
  duoserve chat ./my-mixtral-instruct --memory 12GiB
  duoserve chat Qwen/Qwen3-30B-A3B --system "Answer in one sentence." --temperature 0.7
"""
RESET, EXIT = "/reset", "/exit"
PROMPT = "> "


def add_command(commands: Subparsers) -> None:
    """Registers the command."""
    parser = add_parser(commands, "chat", f"talk with a model; {RESET} forgets, {EXIT} ends", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    add_sampling(parser, fills_context=True)
    add_loading(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Answers stdin line by line. A model that cannot chat is refused before it is loaded."""
    params = sampling(args)
    if ChatTemplate.load(folder_with_text(args.model)) is None:
        raise RequestError(f"{args.model} has no chat template: use duoserve generate, which continues plain text")
    with MoEModel.from_pretrained(args.model, **loading(args)) as model:
        _converse(model, args.system, params, fills_context=args.max_tokens is None)


def _converse(model: MoEModel, system: str | None, params: SamplingParams, fills_context: bool) -> None:
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
            messages = [*asked, {"role": "assistant", "content": _answer(model, asked, params, fills_context)}]
        except RequestError as error:
            print(f"duoserve: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """The lines of stdin that are not empty."""
    while True:
        try:
            line = _line().strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise RequestError(f"what stdin says is not {error.encoding} text: {error.reason}") from error
        if line:
            yield line


def _line() -> str:
    """The next line of stdin. A terminal shows a prompt for it, which a redirected stdout does not receive."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(PROMPT)
    if sys.stdin.isatty():
        print(PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _answer(model: MoEModel, messages: list[dict[str, str]], params: SamplingParams, fills_context: bool) -> str:
    """Streams the answer and returns the part that was said. The template writes special tokens itself."""
    assert model.chat_template is not None and model.tokenizer is not None
    prompt_ids = model.tokenizer.encode(model.chat_template.render(messages), add_special=False)
    if fills_context:  # if a prompt leaves no room, the model's own error says so
        params = replace(params, max_tokens=max(1, model.max_context - len(prompt_ids)))
    done = _shown(model.stream(prompt_ids, params))
    if done.finish_reason == "length":
        limit = f"the context is full (raise --max-context, or {RESET})" if fills_context else "raise --max-tokens"
        print(f"duoserve: the answer was cut off after {len(done.token_ids)} tokens: {limit}", file=sys.stderr)
    return said(model.tokenizer, done.text or "", done.token_ids)


def _shown(pieces: Generator[str, None, Completion]) -> Completion:
    """Prints the pieces as they come."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            done: Completion = end.value
            return done
