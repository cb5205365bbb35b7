"""Answers in channels, as gpt-oss gives them: its thoughts first, then what is said. Source: OpenAI's harmony format.

``<|start|>assistant<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from duoserve.text.tokenizer import Text

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
FINAL = "final"


class Channels:
    """Tells, token by token, which of an answer's are said: those in the channel "final".

    All of them, where the answer has no channels or the tokenizer knows none. ``said`` and ``in_header`` hold for what
    comes next: whether it is said, and whether it only names who says what follows, and where.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._channel, self._message = text.special_id(CHANNEL), text.special_id(MESSAGE)
        self._ends = (text.special_id(END), text.special_id(START))
        self._name: list[int] | None = None  # of the channel, as far as it is written; None before there is one
        self.said = True
        self.in_header = False

    def push(self, token_ids: Iterable[int]) -> bool:
        """Whether the text that comes with ``token_ids`` is said, judged by the last of them.

        A mark has no text: what comes with it is of what it ends.
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
                self.said, self.in_header = self._text.decode(self._name).split()[:1] == [FINAL], False
            else:
                self._name.append(token_id)


def said(text: Text, written: str, token_ids: Sequence[int]) -> str:
    """What is said of a whole answer, ``written`` being the text of ``token_ids``: all behind the last that is not."""
    channels = Channels(text)
    unsaid = max((place for place, token_id in enumerate(token_ids, 1) if not channels.push([token_id])), default=0)
    return written[len(text.decode(token_ids[:unsaid])) :]
