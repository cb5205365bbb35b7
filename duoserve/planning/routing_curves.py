"""Two properties of a model's routing that speed depends on: hit rates of caches, and numbers of distinct experts.

Both are curves, over the share of the experts that is in slots and over the number of tokens. bench/routing_curves.py
makes them from the cards of traces/synthetic.py, and from traces of the embedded models. A model without curves of its
own gets those of the model that is nearest in experts and top-k, scaled to its numbers. UNIFORM stands for untrained
weights, which route by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from duoserve.experts.hub import EMBEDDED
from duoserve.files.strict_json import read_object

_FILE = Path(__file__).resolve().parents[1] / "assets" / "routing.json"
_MAX_BYTES = 1 << 20
UNIFORM = "uniform"


@dataclass(frozen=True)
class RoutingCurves:
    """The curves of the card ``name``, scaled to a model of ``num_experts`` and ``top_k``.

    ``raw`` is the card's record in assets/routing.json.
    """

    name: str
    raw: Mapping[str, Any]
    num_experts: int
    top_k: int

    def hit_rate(self, ranking: str, share: float, batch: int = 1) -> float:
        """The share (0 to 1) of a decode step's experts that are in slots, with an eviction by ``ranking``.

        ``share`` (0 to 1) of a layer's experts are in slots; the step has ``batch`` sequences.
        """
        by_batch = {int(rows): rates for rows, rates in self.raw["hits"][ranking].items()}
        shares = [0.0, *self.raw["shares"], 1.0]
        at_share = [float(np.interp(share, shares, [0.0, *rates, 1.0])) for rates in by_batch.values()]
        return float(np.interp(log(batch), [log(rows) for rows in by_batch], at_share))

    def in_batch(self, batch: int) -> float:
        """How many distinct experts of a layer one token of each of ``batch`` sequences uses, on average."""
        return self._distinct(self.raw["batch"], batch)

    def in_prompt(self, tokens: int) -> float:
        """How many distinct experts of a layer a prompt of ``tokens`` tokens uses, on average."""
        return self._distinct(self.raw["window"], tokens)

    def _distinct(self, curve: Mapping[str, float], tokens: int) -> float:
        """How many distinct experts ``tokens`` tokens use, by the card's ``curve`` of tokens to distinct experts.

        Tokens are scaled, as a token of the model uses another share of the experts than a token of the card.
        """
        raw = self.raw
        scaled = tokens * (self.top_k / self.num_experts) / (raw["top_k"] / raw["num_experts"])
        widths, shares = [int(width) for width in curve], [count / raw["num_experts"] for count in curve.values()]
        if scaled <= 1:
            share = scaled * shares[0]
        elif scaled <= widths[-1]:
            share = float(np.interp(log(scaled), [log(width) for width in widths], shares))
        else:
            share = 1 - _unmet(widths[-2:], [1 - met for met in shares[-2:]], scaled)
        return float(np.clip(share * self.num_experts, self.top_k, self.num_experts))


class ByChance(RoutingCurves):
    """Curves by formula: every token chooses every expert with the same chance, whatever was chosen before."""

    def hit_rate(self, ranking: str, share: float, batch: int = 1) -> float:
        """The share of the experts in slots, as no ranking is better than another."""
        return share

    def _distinct(self, curve: Mapping[str, float], tokens: int) -> float:
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)


def curves_for(num_experts: int, top_k: int, model: str = "") -> RoutingCurves:
    """Curves by chance if ``model`` is UNIFORM, else of the card of that name, else of the most similar card.

    The most similar one is nearest in ``num_experts`` and ``top_k``.
    """
    cards = _cards()
    if model == UNIFORM:
        sizes = {"num_experts": num_experts, "top_k": top_k, "batch": {}, "window": {}}
        return ByChance(UNIFORM, sizes, num_experts, top_k)
    others = [card for card in cards if card not in EMBEDDED]  # embedded models are too small to stand for others
    name = model if model in cards else min(others, key=lambda card: _distance(cards[card], num_experts, top_k))
    return RoutingCurves(name, cards[name], num_experts, top_k)


def known_routings() -> list[str]:
    """The names of all cards, and UNIFORM."""
    return [UNIFORM, *_cards()]


def _unmet(widths: Sequence[int], unmet: Sequence[float], tokens: float) -> float:
    """The share of the experts that none of ``tokens`` tokens uses, for more tokens than any of the ``widths``.

    ``unmet`` has that share at the two largest widths. If experts were chosen by chance, its logarithm would grow in
    proportion to the tokens. But the experts that are left are chosen seldom, so it grows with a power of the tokens:
    the power by which it grew between the two widths.
    """
    fewer, more = unmet
    if more <= 0 or fewer <= more:
        return more
    power = log(log(more) / log(fewer)) / log(widths[1] / widths[0])
    return float(more ** ((tokens / widths[1]) ** power))


def _distance(raw: Mapping[str, Any], num_experts: int, top_k: int) -> float:
    return abs(log(raw["num_experts"] / num_experts)) + abs(log(raw["top_k"] / top_k))


@cache
def _cards() -> dict[str, Any]:
    return read_object(_FILE, _MAX_BYTES)
