"""Reads tokenizer_config.json, which describes a checkpoint's tokenizer beside ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duoserve.files.positional import is_there
from duoserve.files.strict_json import read_object

TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_BYTES = 64 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The file's object, empty if there is no file; raises CheckpointError if it is malformed."""
    path = folder / TOKENIZER_CONFIG
    return read_object(path, MAX_BYTES) if is_there(path) else {}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of the special tokens that have a name; the file has each as text or as an object with the text."""
    found = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found
