"""The bits of logits, in short: what every policy, budget and way to launch must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from duoserve.passes import Passes
from duoserve.request import Request


class NotedPasses(Passes):
    """``logits_BV`` are those of the last decode step, until the next one."""

    logits_BV: Tensor | None = None

    def decode(self, requests: Sequence[Request]) -> Tensor:
        """As in Passes."""
        self.logits_BV = super().decode(requests)
        return self.logits_BV


def digest(logits: Iterable[Tensor]) -> str:
    """Of the bits of all of them, one after another."""
    found = hashlib.sha256()
    for logits_TV in logits:
        if not bool(torch.isfinite(logits_TV).all()):
            return "not finite"
        found.update(logits_TV.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
