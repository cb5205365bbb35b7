"""What single tokens look like in an answer, where a character may be spread over several."""

from __future__ import annotations

from duoserve.text import Text


class TokenText:
    """The bytes of each token of a vocabulary, and a label that tells tokens apart."""

    def __init__(self, text: Text | None) -> None:
        self._text = text

    def data(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token stands for; none for special tokens, and without a tokenizer."""
        if self._text is None or (token := self._text.token(token_id)) is None:
            return b""
        data = self._text.token_bytes(token)
        return self._text.join([token]).encode(errors="replace") if data is None else data

    def label(self, token_id: int) -> str:
        r"""Its text; ``bytes:\xe2`` where that is no whole character, as OpenAI writes it, and its id without any."""
        data = self.data(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
