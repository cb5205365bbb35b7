"""The text of single tokens in an answer, where a character may be spread over several."""

from __future__ import annotations

from collections.abc import Sequence

from duoserve.text.tokenizer import WORD, IncrementalDecoder, Tokenizer


class TokenText:
    """The bytes of each token of a vocabulary, and a label that tells tokens apart. Any thread may ask.

    It keeps what it has made: answers have many tokens, but few different ones.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._data: dict[int, bytes] = {}
        self._labels: dict[int, str] = {}

    def data(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token stands for; none for special tokens, and without a tokenizer.

        They are the bytes behind a word: at the start of a text some decoders strip a token's space.
        """
        found = self._data.get(token_id)
        if found is None:
            found = self._data[token_id] = self._make_data(token_id)
        return found

    def label(self, token_id: int) -> str:
        r"""The token's text; ``bytes:\xe2``, as OpenAI has it, if that is no whole character; its id if it is empty."""
        found = self._labels.get(token_id)
        if found is None:
            found = self._labels[token_id] = self._make_label(token_id)
        return found

    def offsets(self, behind: Sequence[int] = ()) -> Offsets:
        """Offsets of one answer's tokens; its text goes on from that of the tokens ``behind``."""
        return Offsets(self._tokenizer, behind)

    def _make_data(self, token_id: int) -> bytes:
        if self._tokenizer is None or (token := self._tokenizer.token(token_id)) is None:
            return b""
        data = self._tokenizer.token_bytes(token)
        if data is not None:
            return data
        join = self._tokenizer.join
        return join([WORD, token]).removeprefix(join([WORD])).encode(errors="replace")

    def _make_label(self, token_id: int) -> str:
        data = self.data(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """Where the tokens of one answer begin in its text, in characters; always 0 without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, behind: Sequence[int]) -> None:
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, behind)
        self._end = 0

    def next(self, token_id: int) -> int:
        """Where the next token begins, which is ``token_id``; must be asked for all tokens in order."""
        begin = self._end
        if self._decoder is not None:
            self._end += len(self._decoder.push(token_id))
        return begin
