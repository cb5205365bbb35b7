"""The host's books of decode steps that the device carries out by itself, with their misses read from the host's RAM.

Before a step they say which slots its misses may fill; after it they note what the device has done.

N layers that have experts, L layers of the model, B tokens, K top-k, E experts, X misses that a layer can have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from duoserve.config import Phase
from duoserve.errors import IntegrityError
from duoserve.experts.layout import ExpertId
from duoserve.kernels import by_demand
from duoserve.metrics import Meter
from duoserve.scheduling.plan import BEFORE_FIRST, ModelShape
from duoserve.scheduling.residency import Residency
from duoserve.scheduling.spaces import Cache
from duoserve.scheduling.step_guesses import StepGuesses

# The share of the slots that is kept EMPTY for the misses of a step. If more are, fewer experts stay in slots; if fewer
# are, later layers overwrite what earlier ones have brought. Not measured yet.
SPARE_SHARE = 1 / 8

# Called with a layer, the experts that it has used, the most wanted first, and the number of tokens of each.
UseListener = Callable[[int, Sequence[int], Sequence[int]], None]


class Fill(NamedTuple):
    """A miss of a step: the device has brought ``expert`` into ``slot``.

    ``stayed`` is False if a later layer of the step has overwritten the slot with a miss of its own.
    """

    expert: ExpertId
    slot: int
    stayed: bool


def most_misses(shape: ModelShape, num_tokens: int) -> int:
    """X: the most experts that a layer of a step of ``num_tokens`` tokens can miss; each needs an EMPTY slot."""
    return min(shape.num_experts, num_tokens * shape.top_k)


def spread_targets(spare: Sequence[int], num_layers: int, width: int) -> np.ndarray:
    """The slots that each layer's misses fill, in this order: int32 [N, X]. X = ``width`` is at most len(spare).

    Each layer begins at another place of ``spare``, evenly spread, so that a layer overwrites as few misses of others
    as possible.
    """
    first_N1 = np.arange(num_layers)[:, None] * len(spare) // num_layers
    targets_NX: np.ndarray = np.resize(np.asarray(spare, dtype=np.int32), 2 * len(spare))[first_N1 + np.arange(width)]
    return targets_NX


def fills(layers: Sequence[int], ids_NBK: np.ndarray, slots_NBK: np.ndarray, targets_NX: np.ndarray) -> list[Fill]:
    """What the device brought into slots in a step, layer by layer.

    The chosen experts whose slot was -1 are a layer's misses. In ascending order of the experts they filled the layer's
    targets, one after the other.
    """
    made = []
    for at in np.flatnonzero((slots_NBK < 0).any(axis=(1, 2))).tolist():
        missing = np.unique(ids_NBK[at][slots_NBK[at] < 0]).tolist()
        pairs = zip(missing, targets_NX[at].tolist(), strict=False)
        made += [(ExpertId(layers[at], expert), slot) for expert, slot in pairs]
    last = {slot: expert for expert, slot in made}
    return [Fill(expert, slot, last[slot] == expert) for expert, slot in made]


class ReadThrough:
    """Keeps the books of such steps: ``lay_targets`` before each, ``took`` after it, ``catch_up`` while one runs.

    ``guess`` may follow ``took``, once the listeners have heard the routing of the step. ``catch_up`` does what the
    next step need not wait for, and tells ``used`` of every layer's experts, by which the eviction ranks them. The
    scheduler makes the one ReadThrough of its passes.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        residency: Residency,
        cache: Cache,
        shape: ModelShape,
        meter: Meter,
        used: UseListener,
        guesses: StepGuesses,
        may_miss: bool,
    ) -> None:
        self.may_miss = may_miss  # else every expert is in a slot before each step
        self._guesses = guesses
        self._residency = residency
        self._cache = cache
        self._shape = shape
        self._meter = meter
        self._used = used
        self._places = {layer: at for at, layer in enumerate(shape.layers)}
        self._layers_N11 = np.array(shape.layers)[:, None, None]
        self._targets_NX = np.empty((len(shape.layers), 0), dtype=np.int32)
        self.slots_LE = residency.table.ready_LE.copy()  # int32: the table that the step goes by; for others to read
        self._last: tuple[np.ndarray, np.ndarray] | None = None  # ids and slots [N, B, K] of the last step
        self._most = self._wished = 0  # slots that the misses of a layer fill; that are kept free for all layers'
        self._done = False
        self._wrong: frozenset[ExpertId] = frozenset()  # guesses that the last step did not want

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have experts, by their numbers in the model, in order."""
        return self._shape.layers

    def fits(self, num_tokens: int) -> bool:
        """Whether such a step can run: there are slots for all that a layer may miss, or for all experts."""
        num_slots = self._residency.table.num_slots
        return num_slots >= min(most_misses(self._shape, num_tokens), self._shape.total_experts)

    def lay_targets(self, num_tokens: int) -> np.ndarray:
        """Gives the slots, all EMPTY, that the misses of each layer fill in the coming step: int32 [N, X].

        Experts are given up where too few slots are EMPTY; IntegrityError where even that is not enough, or where a
        step may miss although nothing ``may_miss``. Until ``took`` only ``catch_up`` may change a slot.
        """
        self._guesses.launched()
        num_slots, most = self._residency.table.num_slots, most_misses(self._shape, num_tokens)
        self._most, self._done = most, False
        self._wished = max(most, min(int(SPARE_SHARE * num_slots), len(self.layers) * most))
        if len(self._residency.table.empty_slots()) < most:
            self.catch_up()
            self._make_room(most)
        spare = self._residency.table.empty_slots()
        width = min(most, self._shape.total_experts - sum(self._residency.filled()))
        if width and not self.may_miss:
            raise IntegrityError(f"a step may miss {width} experts, of which all were to be in slots")
        if len(spare) < width:
            raise IntegrityError(f"a step of {num_tokens} tokens may miss {width} experts; {len(spare)} slots are free")
        np.copyto(self.slots_LE, self._residency.table.ready_LE)
        self._targets_NX = spread_targets(spare, len(self.layers), width)
        return self._targets_NX

    def catch_up(self) -> None:
        """Notes the hits of the last step as used, then makes room for the misses of the step after the one that runs.

        Guesses for the step that runs are not given up for that: it has yet to read them.
        """
        self._note_last()
        self._make_room(self._wished, [guess for guess in self._residency.ledger.unused if guess not in self._wrong])

    def took(self, ids_NBK: np.ndarray) -> None:
        """The step that was laid out has been carried out; ``ids_NBK`` are the experts chosen in every layer."""
        slots_NBK = self.slots_LE[self._layers_N11, ids_NBK]
        made = fills(self.layers, ids_NBK, slots_NBK, self._targets_NX)
        for fill in made:
            self._residency.filled_by_device(fill.expert, fill.slot if fill.stayed else None)
        num_hits = _num_distinct(ids_NBK) - len(made)
        self._meter.hit(Phase.DECODE, num_hits)
        self._meter.miss(Phase.DECODE, len(made))
        self._last = ids_NBK.copy(), slots_NBK
        came_true = self._residency.came_true(lambda guess: guess.expert in ids_NBK[self._places[guess.layer]])
        self._wrong = frozenset(self._residency.ledger.unused)
        self._guesses.stepped(num_hits, came_true)
        self._done = True

    def guess(self) -> None:
        """Starts copies of what the next step may want, if they pay; ``lay_targets`` cancels those that wait then."""
        self._done = False  # until all is asked for, and no copy is half in the books
        self._guesses.ask(self._room)
        self._done = True

    def ended(self) -> bool:
        """A pass has ended; gives whether it was a step of these books that came to its end."""
        done, self._done = self._done, False
        if not done:
            self._guesses.pause()
        return done

    def pause(self) -> None:
        """A pass of another kind comes before the next step: notes what the last step used, for that came first."""
        self._note_last()
        self._guesses.pause()

    def _room(self, num_slots: int) -> list[int]:
        """Up to ``num_slots`` EMPTY slots for guesses, beyond those that a layer of the next step may need."""
        if len(self._residency.table.empty_slots()) < self._most + num_slots:
            self.catch_up()
            self._make_room(self._most + num_slots)
        return self._residency.table.empty_slots()[self._most :]

    def _note_last(self) -> None:
        if self._last is not None:
            for layer, ids_BK, slots_BK in zip(self.layers, *map(np.ndarray.tolist, self._last), strict=True):
                self._touch(layer, list(chain(*ids_BK)), list(chain(*slots_BK)))
            self._last = None

    def _touch(self, layer: int, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Notes one layer's use of what each token chose, and of its slots, the most wanted as the last used.

        An expert that has lost its slot meanwhile is not touched, even if it is on its way into the same slot again.
        """
        idle, rows, slot_of = self._residency.idle[layer], Counter(experts), dict(zip(experts, slots, strict=True))
        wanted = by_demand(rows)
        self._used(layer, wanted, [rows[expert] for expert in wanted])
        for expert in reversed(wanted):
            if slot_of[expert] >= 0 and idle.get(expert) == slot_of[expert]:
                self._residency.touch(ExpertId(layer, expert), slot_of[expert])

    def _make_room(self, num_slots: int, spared: Collection[ExpertId] = ()) -> None:
        """Gives up experts until ``num_slots`` slots are EMPTY, or only ``spared`` ones are left to give up."""
        if self._residency.table.num_slots < self._shape.total_experts:  # else what is absent finds an EMPTY slot
            for _ in range(num_slots - len(self._residency.table.empty_slots())):
                if self._cache.give_up(BEFORE_FIRST, spared) is None:
                    break


def _num_distinct(ids_NBK: np.ndarray) -> int:
    """The number of distinct experts of each layer, summed over the layers."""
    sorted_NR = np.sort(ids_NBK.reshape(len(ids_NBK), -1))
    return len(sorted_NR) + int(np.count_nonzero(np.diff(sorted_NR)))
