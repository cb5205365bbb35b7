"""Answers in channels, as gpt-oss gives them: thoughts first, then what is said. Source: OpenAI's harmony format.

``<|start|>assistant<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from duoserve.text.tokenizer import Tokenizer

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
FINAL = "final"


class Channels:
    """Tells, token by token, which tokens of an answer are said: those in the channel "final".

    All tokens are said if the answer has no channels, or if the tokenizer has no marks for them. ``said`` and
    ``in_header`` are about the next token: whether it is said, and whether it belongs to a message's header, which
    names the role and the channel.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._channel, self._message = tokenizer.special_id(CHANNEL), tokenizer.special_id(MESSAGE)
        self._ends = (tokenizer.special_id(END), tokenizer.special_id(START))
        self._name: list[int] | None = None  # the channel's name so far, in tokens; None before the first header
        self.said = True
        self.in_header = False

    def push(self, token_ids: Iterable[int]) -> bool:
        """Whether the text that comes with ``token_ids`` is said, judged by the last of them.

        A mark has no text of its own: text that comes with it belongs to the message that it ends.
        """
        said = self.said
        for token_id in token_ids:
            said = self.said
            self._take(token_id)
        return said

    def _take(self, token_id: int) -> None:
        if token_id == self._channel or (token_id in self._ends and self._name is not None):
            self.said, self.in_header, self._name = False, True, []
        elif self._name is not None and self.in_header:
            if token_id == self._message:
                self.said, self.in_header = self._tokenizer.decode(self._name).split()[:1] == [FINAL], False
            else:
                self._name.append(token_id)


def said(tokenizer: Tokenizer, written: str, token_ids: Sequence[int]) -> str:
    """The part of an answer's text that is said: all behind the last token that is not.

    ``written`` is the text of all ``token_ids``.
    """
    channels = Channels(tokenizer)
    unsaid = max((place for place, token_id in enumerate(token_ids, 1) if not channels.push([token_id])), default=0)
    return written[len(tokenizer.decode(token_ids[:unsaid])) :]
