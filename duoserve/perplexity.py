"""How well a model predicts a text. T tokens, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from duoserve.errors import RequestError
from duoserve.moe_model import MoEModel

WINDOW = 1024  # tokens of one pass
OVERLAP = 256  # tokens repeated from the pass before, so that all but the first tokens have at least these before them


class TextScore(NamedTuple):
    """The negative log-likelihood of the ``tokens`` that were predicted, in ``nats``, summed over them."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens among which one would be as hard to predict."""
        return math.exp(self.nats / self.tokens)

    def bits_per_byte(self, nbytes: int) -> float:
        """Bits of negative log-likelihood for each byte of a text of ``nbytes`` bytes."""
        return self.nats / math.log(2) / nbytes


def check_length(token_ids: Sequence[int]) -> None:
    """Raises RequestError if there are fewer than two tokens, so that none can be predicted."""
    if len(token_ids) < 2:
        raise RequestError(f"{len(token_ids)} tokens are no text that could be predicted: at least 2 are needed")


def scored_ids(token_ids: list[int], bos_token_id: int | None) -> list[int]:
    """The tokens of a text behind the token that begins a text, if there is one and they do not begin with it."""
    first = [] if bos_token_id is None else [bos_token_id]
    return token_ids if token_ids[:1] == first else first + token_ids


def score(model: MoEModel, token_ids: Sequence[int]) -> TextScore:
    """Scores every token but the first by those before it. The model must take WINDOW tokens at once.

    Raises RequestError if there are fewer than two tokens.
    """
    check_length(token_ids)
    ids_T, nats, known = torch.tensor(token_ids, device="cpu"), 0.0, 1
    while known < len(ids_T):
        start = max(0, known - OVERLAP)
        window_T = ids_T[start : start + WINDOW]
        logits_TV = model.forward(window_T.tolist())[known - start - 1 : -1]
        nats += F.cross_entropy(logits_TV.double(), window_T[known - start :], reduction="sum").item()
        known = start + len(window_T)
    return TextScore(nats, len(ids_T) - 1)
