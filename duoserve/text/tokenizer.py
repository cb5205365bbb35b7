"""From text to token ids and back, whole or a token at a time as they are generated."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from duoserve.errors import CheckpointError, DuoServeError, RequestError
from duoserve.files.positional import is_there
from duoserve.text.tokenizer_config import TOKENIZER_CONFIG, read_tokenizer_config, special_tokens

TOKENIZER = "tokenizer.json"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WORD = "a"  # an entry that every decoder takes for a word
LOOKED_BACK = 64  # this many tokens are searched for the last that has text, which special tokens do not have


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level vocabularies write it: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A checkpoint's tokenizer. ``decode`` gives to the character what :class:`IncrementalDecoder` streams."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()  # a tokenizer.json may still have truncation or padding from training
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        decoder = tokenizer.decoder
        kinds = set() if decoder is None else _decoder_kinds(json.loads(decoder.__getstate__()))
        self.byte_level = "ByteLevel" in kinds  # every token is a run of bytes
        self._byte_fallback = "ByteFallback" in kinds  # a token such as <0xE2> is one byte
        self._join: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer in ``folder/tokenizer.json``, None if there is none; raises CheckpointError if it is broken.

        If it adds no special tokens by itself, those that ``tokenizer_config.json`` names are added.
        """
        path = folder / TOKENIZER
        if not is_there(path):
            return None
        config = read_tokenizer_config(folder)
        with _guarded(CheckpointError, f"{path} is not a tokenizer that can be used: download it again"):
            return cls(_completed(tokenizers.Tokenizer.from_file(str(path)), config))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of ``text``, with the special tokens that the post-processor adds if ``add_special``.

        Special tokens that are written in the text are encoded as such in any case. Raises RequestError for text that
        cannot be encoded.
        """
        with _guarded(RequestError, "the tokenizer cannot encode this text"):
            # Encoded as a batch of one, which releases the GIL: else a long text would hold up all other threads.
            [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=add_special)
            return list(encoding.ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ``token_ids``; special tokens, and ids that the tokenizer does not know, have none."""
        decoder = IncrementalDecoder(self)
        return "".join([decoder.push(token_id) for token_id in token_ids] + [decoder.flush()])

    def join(self, tokens: list[str]) -> str:
        """The text of vocabulary entries that follow each other; DuoServeError where the decoder fails."""
        try:
            return self._join(tokens)
        except BaseException:  # guarded no earlier: there is a join or two for each token, and the guard costs as much
            with _guarded(DuoServeError, f"the tokenizer cannot decode {tokens}"):
                raise

    def entry(self, token_id: int) -> str | None:
        """The vocabulary's entry, of special tokens too; None for ids beyond the vocabulary."""
        with _guarded(RequestError, f"{token_id!r} is not a token id"):
            return self._tokenizer.id_to_token(token_id)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry, None for special tokens and for ids beyond the vocabulary."""
        with _guarded(RequestError, f"{token_id!r} is not a token id"):
            return None if token_id in self._special else self._tokenizer.id_to_token(token_id)

    def special_id(self, token: str) -> int | None:
        """The id of a special token, None if there is none of that name."""
        token_id = self._tokenizer.token_to_id(token)
        return token_id if token_id in self._special else None

    def token_bytes(self, token: str) -> bytes | None:
        """The bytes that ``token`` stands for, None if it stands for characters."""
        if self.byte_level:
            known = all(char in BYTE_OF for char in token)  # else it is an added token, which is plain text
            return bytes(BYTE_OF[char] for char in token) if known else token.encode()
        match = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None


class IncrementalDecoder:
    """The text of a growing token sequence, in pieces that are final when they are given; each token costs the same.

    A character that is spread over tokens is held back until it is whole. Bytes that are not UTF-8 become U+FFFD, one
    for each maximal invalid part. ``tokenizers`` does the same for byte-level vocabularies, but replaces a whole run of
    byte tokens such as ``<0xE2>`` if any of it is invalid, which a stream cannot know in advance.

    The text goes on from that of the token ids ``behind``, and so keeps the space before its first word. If none of
    them has text, it begins anew, as in ``Tokenizer.decode``.
    """

    def __init__(self, tokenizer: Tokenizer, behind: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # The last token with text, if any: whether a token keeps the space at its start depends on there being one.
        self._before = _last_written(tokenizer, behind)

    def push(self, token_id: int) -> str:
        """The text that became certain with ``token_id``; may be empty."""
        token = self._tokenizer.token(token_id)
        if not token:
            return ""
        data = self._tokenizer.token_bytes(token)
        return self.flush() + self._write(token) if data is None else self._write(self._utf8.decode(data))

    def flush(self) -> str:
        """The rest that was held back: U+FFFD for a character that never became whole."""
        return self._write(self._utf8.decode(b"", True))

    def _write(self, token: str) -> str:
        if self._tokenizer.byte_level or not token:
            return token
        piece = self._tokenizer.join([*self._before, token])[len(self._tokenizer.join(self._before)) :]
        self._before = [token]
        return piece


class StopStrings:
    """Cuts text at the stop string that is completed first, even if that spans several pieces of the text.

    ``found`` is that string, None until then. Text that may turn out to begin a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain to precede any stop string; nothing once one has been found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, cut, self.found = min(hits)
            self._held = ""
        else:
            cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text that was held back, for when no more follows."""
        held, self._held = self._held, ""
        return held


def _completed(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer, which adds the tokens that ``config`` names at both ends of a text, if it adds none by itself.

    DeepSeek's tokenizers need it. Transformers 4 applied these flags too; version 5 does not if there is a
    tokenizer.json. Raises ValueError for a token that the tokenizer does not have.
    """
    tokens = special_tokens(config)
    bos, eos = ([tokens[n]] if config.get(f"add_{n}") and n in tokens else [] for n in ("bos_token", "eos_token"))
    ids = {token: tokenizer.token_to_id(token) for token in bos + eos}
    if not ids or tokenizer.num_special_tokens_to_add(is_pair=False):
        return tokenizer
    for token, token_id in ids.items():
        if token_id is None:
            raise ValueError(f"{TOKENIZER_CONFIG} adds {token!r}, which is none of its tokens")
    tokenizer.post_processor = TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=list(ids.items()))
    return tokenizer


def _last_written(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """A list of the last of ``token_ids`` that has text; ``WORD`` stands for one that may be a part of a character."""
    token = next(filter(None, map(tokenizer.token, reversed(token_ids[-LOOKED_BACK:]))), None)
    if token is None:
        return []
    return [token if tokenizer.token_bytes(token) is None else WORD]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    if decoder["type"] == "Sequence":
        return {kind for part in decoder["decoders"] for kind in _decoder_kinds(part)}
    return {decoder["type"]}


@contextmanager
def _guarded(error: type[DuoServeError], message: str) -> Iterator[None]:
    """Turns anything that the tokenizer raises into ``error``; a panic in its Rust code is a bare BaseException."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:
        raise error(f"{message}: {fault}") from fault
