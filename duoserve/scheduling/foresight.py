"""From a predictor's chances to guesses: which experts to copy before their layer has been routed.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

import numpy as np

from duoserve.config import Phase
from duoserve.experts.layout import ExpertId
from duoserve.scheduling.decode import next_layers
from duoserve.scheduling.link_budget import Calibration, Guess, IdleLink, Link, affordable
from duoserve.scheduling.plan import NO_GUESSES, Guesses, GuessMode, ModelShape
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.routing import Routing, RoutingListener

# Experts of a coming layer that are at least this likely are not given up for guesses about others.
SPARED_CHANCE = 0.2
# What is said to be less likely than this is not even followed.
_WORTH_HEARING = 0.05


class Foresight(RoutingListener):
    """Passes the routing on to ``predictor``, and turns the chances that it gives into guesses.

    ``link`` measures the link for the guesses' budget; the scheduler tells it when layers are routed and copies arrive.
    No guesses are made without a predictor, or where the model has one layer with experts.
    """

    def __init__(self, predictor: Predictor | None, mode: GuessMode, shape: ModelShape) -> None:
        self._predictor = predictor
        self._shape = shape
        self._horizon = 0 if predictor is None else min(predictor.horizon, len(shape.layers) - 1)
        self._mode = mode if self._horizon else GuessMode.NONE
        self._calibrations = [Calibration() for _ in range(self._horizon)]
        self._stated: dict[int, list[tuple[int, list[Guess]]]] = {}  # by layer: how far ahead it was, what was said
        self._spared: frozenset[ExpertId] = frozenset()  # as was said last
        self.link = IdleLink(shape.depth, shape.total_experts)

    @property
    def lookahead(self) -> int:
        """For how many layers ahead the predictor wants look-ahead scores."""
        return 0 if self._predictor is None else self._predictor.lookahead

    @property
    def guesses_at_all(self) -> bool:
        """Whether guesses are made: the policy wants them, and there are a predictor and a layer to guess about."""
        return self._mode is not GuessMode.NONE

    @property
    def guesses_within_budget(self) -> bool:
        """Whether guesses have a budget, for which ``link`` must measure."""
        return self._mode is GuessMode.BUDGET

    def begin(self, phase: Phase, requests_T: np.ndarray) -> None:
        if phase is Phase.PREFILL:
            self._stated.clear()
            self._spared = frozenset()
            self.link.pause()
        if self._predictor is not None:
            self._predictor.begin(phase, requests_T)

    def routed(self, routing: Routing) -> None:
        if self._predictor is not None:
            self._predictor.observe(routing)
            self._settle(routing)

    def so_far(self, layer: int) -> Guesses:
        """What the plan of ``layer`` may use before its routing has been heard: earlier guesses, and no new copies.

        Guesses of earlier layers about the layers ahead keep their slots, and what was spared for these stays so.
        """
        if not self.guesses_at_all:
            return NO_GUESSES
        ahead = next_layers(layer, self._shape, self._horizon)
        return Guesses((), ahead, frozenset([one for one in self._spared if one.layer in ahead]))

    def guess(
        self,
        layer: int,
        present: Sequence[Collection[int]],
        under_way: Collection[ExpertId],
        unused: Collection[ExpertId] = (),
        link: Link | None = None,
    ) -> Guesses:
        """New guesses, now that the routing of ``layer`` has been heard: copies to make behind its demands.

        ``present`` has by layer the experts that are in a slot or on their way. ``under_way`` are the guesses that are
        being copied, ``unused`` those in slots that no layer has used yet. Copies cost what ``link`` has measured
        (``self.link`` if it is not given).
        """
        if self._mode is GuessMode.NONE or self._predictor is None:
            return NO_GUESSES
        ahead = next_layers(layer, self._shape, self._horizon)
        chances = [self._predictor.predict(other) for other in ahead]
        if self._mode is GuessMode.TOP_K:
            guesses = self._likeliest(ahead, chances, present)
        else:
            queued = sum(one.layer in ahead for one in under_way)
            num_open = len(under_way) + len(unused)
            guesses = self._paying(ahead, chances, present, queued, num_open, link or self.link)
        self._spared = guesses.spared
        return guesses

    def _likeliest(
        self, ahead: Sequence[int], chances: Sequence[np.ndarray], present: Sequence[Collection[int]]
    ) -> Guesses:
        top_k = self._shape.top_k
        best = [(layer, best_experts(chances_E, top_k)) for layer, chances_E in zip(ahead, chances, strict=True)]
        wanted = [ExpertId(layer, expert) for layer, experts in best for expert in experts]
        copies = tuple(one for one in wanted if one.expert not in present[one.layer])
        return Guesses(copies, tuple(ahead), frozenset(wanted))

    def _paying(  # noqa: PLR0913, PLR0917
        self,
        ahead: Sequence[int],
        chances: Sequence[np.ndarray],
        present: Sequence[Collection[int]],
        queued: int,
        num_open: int,
        link: Link,
    ) -> Guesses:
        heard = []
        for distance, (layer, chances_E) in enumerate(zip(ahead, chances, strict=True)):
            stated = self._absent(chances_E, present[layer])
            self._stated.setdefault(layer, []).append((distance, stated))
            calibration = self._calibrations[distance]
            worth = [(distance, Guess(guess.expert, calibration.chance(guess.chance))) for guess in stated]
            heard.append(sorted(worth, key=_chance, reverse=True))
        copy_s = link.copy_s
        if copy_s is None:
            return Guesses(ahead=tuple(ahead))
        victims = [link.use_chance(len(present[layer])) for layer in ahead]
        paying = affordable(chain.from_iterable(heard), link.idle_before(ahead[0]), copy_s, queued, victims)
        allowed = max(0, link.account.allows(copy_s) - num_open)
        copies = tuple(ExpertId(ahead[distance], guess.expert) for distance, guess in paying[:allowed])
        return Guesses(copies, tuple(ahead), self._worth_sparing(ahead, chances) if copies else frozenset())

    def _absent(self, chances_E: np.ndarray, present: Collection[int]) -> list[Guess]:
        """The ``top_k`` likeliest experts that are not ``present``, with the chances that the predictor states."""
        likely = np.flatnonzero(chances_E >= _WORTH_HEARING)
        stated = map(Guess, likely.tolist(), chances_E[likely].tolist())
        absent = [guess for guess in stated if guess.expert not in present]
        if len(absent) > self._shape.top_k:
            absent.sort(key=_stated_chance, reverse=True)
        return absent[: self._shape.top_k]

    def _worth_sparing(self, ahead: Sequence[int], chances: Sequence[np.ndarray]) -> frozenset[ExpertId]:
        return frozenset(
            ExpertId(layer, expert)
            for layer, chances_E in zip(ahead, chances, strict=True)
            for expert in np.flatnonzero(chances_E >= SPARED_CHANCE).tolist()
        )

    def _settle(self, routing: Routing) -> None:
        """Tells the calibrations which of the chances stated for this layer came true."""
        stated = self._stated.pop(routing.layer, ())
        if stated:
            wanted = set(routing.topk_ids_TK.ravel().tolist())
            for distance, guesses in stated:
                for expert, chance in guesses:
                    self._calibrations[distance].note(chance, expert in wanted)


def best_experts(chances_E: np.ndarray, count: int) -> list[int]:
    """The ``count`` likeliest experts, the likeliest first."""
    num_experts = len(chances_E)
    best_K = np.argpartition(-chances_E, count - 1)[:count] if count < num_experts else np.arange(num_experts)
    likeliest_first: list[int] = best_K[np.argsort(-chances_E[best_K], kind="stable")].tolist()
    return likeliest_first


def _chance(guess: tuple[int, Guess]) -> float:
    return guess[1].chance


def _stated_chance(guess: Guess) -> float:
    return guess.chance
