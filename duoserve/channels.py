"""Answers in channels, as gpt-oss gives them: its thoughts first, then what is said. Source: OpenAI's harmony format.

``<|start|>assistant<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from duoserve.text import Text

CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
FINAL = "final"


class Channels:
    """Tells, token by token, which of an answer's are said: those in the channel "final".

    All of them, where the answer has no channels or the tokenizer knows none.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._channel, self._message = text.special_id(CHANNEL), text.special_id(MESSAGE)
        self._name: list[int] | None = None  # of the channel, as far as it is written
        self._said = True

    def push(self, token_ids: Iterable[int]) -> bool:
        """Whether what the next ``token_ids`` add is said, judged by the last of them."""
        for token_id in token_ids:
            if token_id == self._channel:
                self._said, self._name = False, []
            elif token_id == self._message and self._name is not None:
                self._said, self._name = self._text.decode(self._name).split()[:1] == [FINAL], None
            elif self._name is not None:
                self._name.append(token_id)
        return self._said


def said(text: Text, written: str, token_ids: Sequence[int]) -> str:
    """What is said of a whole answer, ``written`` being the text of ``token_ids``: all behind the last that is not."""
    channels = Channels(text)
    unsaid = max((place for place, token_id in enumerate(token_ids, 1) if not channels.push([token_id])), default=0)
    return written[len(text.decode(token_ids[:unsaid])) :]
