"""Reads prompts from a file, for commands that run many."""

from __future__ import annotations

import json
from pathlib import Path

from duoserve.errors import RequestError


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file; raises RequestError if it cannot be read or has none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts {path}: cannot be read ({error})") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise RequestError(f"--prompts {path}: has no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_from_json(line, f"--prompts {path}, line {number}") for number, line in numbered]


def _from_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets that are nested thousands deep
        raise RequestError(f"{where}: is not JSON ({error})") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise RequestError(f'{where}: must be a text, or an object with a text "prompt"')
    return prompt
