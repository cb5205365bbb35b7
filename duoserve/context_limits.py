"""The bounds that a prompt and its answer must keep to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duoserve.errors import RequestError


@dataclass(frozen=True)
class ContextLimits:
    """Bounds of each request: ids lie below ``vocab_size``, and prompt and answer together have a limited length.

    The model knows ``num_positions`` positions, and the KV cache has ``room`` for that many tokens.
    """

    vocab_size: int
    num_positions: int
    room: int

    @property
    def max_context(self) -> int:
        """The most tokens of prompt and answer that a request may have."""
        return min(self.room, self.num_positions)

    def check(self, token_ids: Sequence[int], max_tokens: int) -> None:
        """Raises RequestError if a prompt can never be served, or not with an answer of ``max_tokens`` tokens."""
        self._check_ids(token_ids)
        asked = f"{len(token_ids)} prompt tokens and max_tokens={max_tokens} exceed the"
        needed = len(token_ids) + max_tokens
        if needed > self.num_positions:
            raise RequestError(
                f"{asked} {self.num_positions} positions that the model knows: lower max_tokens or shorten the prompt"
            )
        if needed > self.room:
            raise RequestError(
                f"{asked} context of {self.room} tokens: "
                "lower max_tokens, shorten the prompt, or load the model with a larger max_context"
            )

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        bad = next((t for t in token_ids if not 0 <= t < self.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} lies outside the vocabulary, 0..{self.vocab_size - 1}")
