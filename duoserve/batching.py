"""What to do next: whom to start, how far to take a prefill, whom to refuse. Pure functions of plain data.

All times are seconds on one clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isinf
from typing import NamedTuple

from duoserve.cost import Costs
from duoserve.service import Objectives, ServiceSettings

# Between two steps requests come and go and are cancelled: no step is planned to take longer, but for a single layer.
STEP_S = 0.05
# A request that has no objective, or that is too late for it, is started before any that came so much later.
PATIENCE_S = 10.0


class Asked(NamedTuple):
    """A request that waits: its prompt's tokens, and the ``room`` in the KV cache that it will be given."""

    arrived: float
    num_prompt: int
    room: int
    objectives: Objectives = Objectives()


class Going(NamedTuple):
    """A request that has a token: when it got its last, how many it may still get, and the room it gives back then."""

    last_token: float
    left: int
    room: int
    tpot_s: float | None = None


class Coming(NamedTuple):
    """The prefill that is under way: tokens and requests in it, and layers that are left."""

    num_tokens: int
    num_requests: int
    layers_left: int


class Load(NamedTuple):
    """All that a choice depends on. ``free`` is the room in the KV cache that nobody has."""

    now: float
    waiting: Sequence[Asked]
    running: Sequence[Going]
    free: int
    coming: Coming | None = None


class Refusal(NamedTuple):
    """Why a request cannot be served in time, and when it is worth another try."""

    why: str
    retry_after_s: float


@dataclass(frozen=True)
class Batching:
    """Chooses by ``settings`` and by what work is expected to cost on a model of ``num_layers`` layers."""

    settings: ServiceSettings
    costs: Costs
    num_layers: int

    def start(self, load: Load) -> list[int]:
        """Which of the waiting, by their places, to prefill together now; only when no prefill is under way."""
        chosen: list[int] = []
        free, tokens, deadline = load.free, 0, inf
        for place in self.order(load):
            asked = load.waiting[place]
            soonest = min(deadline, self._deadline(asked, load.now))
            finished = load.now + self._prefill_s(tokens + asked.num_prompt)
            if not self._may_join(len(load.running) + len(chosen), asked, load):
                break
            if asked.room > free or (chosen and finished > soonest and not self._fcfs):
                if self._fcfs or self._start_by(asked, load.now) <= load.now:
                    break  # nobody overtakes one whose time has come
                continue
            chosen.append(place)
            free, tokens, deadline = free - asked.room, tokens + asked.num_prompt, soonest
        return chosen

    def order(self, load: Load) -> list[int]:
        """The places of the waiting, the one that should start first in front: the least slack, or the first come."""
        places = range(len(load.waiting))
        if self._fcfs:
            return sorted(places, key=lambda place: load.waiting[place].arrived)
        return sorted(places, key=lambda place: (self._start_by(load.waiting[place], load.now), place))

    def layers(self, load: Load, decoded: bool) -> int:
        """How many layers of the prefill that is under way to compute now; 0: a decode step comes first.

        ``decoded``: the last step was a decode step, so at least one layer is due.
        """
        assert load.coming is not None
        layer_s = self.costs.layer_s(load.coming.num_tokens)
        if layer_s == 0:
            return 1  # it has to be measured first
        most = min(max(1, int(STEP_S / layer_s)), load.coming.layers_left)
        spare_s = inf if self._fcfs else self._spare_s(load)
        affordable = most if isinf(spare_s) else int(spare_s / layer_s)
        return min(max(affordable, int(decoded)), most)

    def refusal(self, asked: Asked, load: Load) -> Refusal | None:
        """Why ``asked``, behind all others, cannot meet its objectives; None if it can, as far as is known."""
        ttft_s, tpot_s = asked.objectives.ttft_s, asked.objectives.tpot_s
        if tpot_s is not None and self.costs.decode_s(1) > tpot_s:
            needed = self.costs.decode_s(1)
            return Refusal(f"a token takes {needed:.3g} s even alone, its objective is {tpot_s:.3g} s", needed)
        if ttft_s is None:
            return None
        expected = self.first_token_s(asked, load)
        if expected <= ttft_s:
            return None
        why = f"its first token is expected after {expected:.3g} s, its objective is {ttft_s:.3g} s"
        return Refusal(why, max(0.1, expected - ttft_s))

    def first_token_s(self, asked: Asked, load: Load) -> float:
        """In how many seconds ``asked`` can expect its first token, behind all that wait and are under way."""
        coming = load.coming
        begun = 0.0 if coming is None else coming.layers_left * self.costs.layer_s(coming.num_tokens)
        tokens = asked.num_prompt + sum(other.num_prompt for other in load.waiting)
        work = begun + self._prefill_s(tokens)
        return self._place_s(asked, load) + work * self._slowdown(load, tokens)

    @property
    def _fcfs(self) -> bool:
        return self.settings.scheduler == "fcfs"

    def _prefill_s(self, tokens: int) -> float:
        return self.num_layers * self.costs.layer_s(tokens)

    def _deadline(self, asked: Asked, now: float) -> float:
        """When its first token is due; never, if that can no longer be met."""
        if asked.objectives.ttft_s is None:
            return inf
        due = asked.arrived + asked.objectives.ttft_s
        return due if now + self._prefill_s(asked.num_prompt) <= due else inf

    def _start_by(self, asked: Asked, now: float) -> float:
        """When it must start to be in time; without hope of that, when patience ends."""
        in_time = self._deadline(asked, now) - self._prefill_s(asked.num_prompt)
        return min(in_time, asked.arrived + PATIENCE_S)

    def _may_join(self, num_ahead: int, asked: Asked, load: Load) -> bool:
        """Whether a batch of one more keeps every objective for later tokens that a smaller one keeps."""
        if num_ahead + (load.coming.num_requests if load.coming else 0) >= self.settings.max_batch:
            return False
        if self._fcfs or num_ahead == 0:
            return True
        goals = [going.tpot_s for going in load.running] + [asked.objectives.tpot_s]
        kept = [goal for goal in goals if goal is not None and goal >= self.costs.decode_s(1)]
        return self.costs.decode_s(num_ahead + 1) <= min(kept, default=inf)

    def _spare_s(self, load: Load) -> float:
        """How long the next decode step can wait."""
        step_s = self.costs.decode_s(len(load.running))
        dues = [going.last_token + going.tpot_s for going in load.running if going.tpot_s is not None]
        return max(0.0, min(dues, default=inf) - step_s - load.now)

    def _slowdown(self, load: Load, tokens: int) -> float:
        """How much longer a prefill takes with decode steps between its slices."""
        goals = [going.tpot_s for going in load.running if going.tpot_s is not None]
        if self._fcfs or not goals:
            return 1.0
        step_s, layer_s = self.costs.decode_s(len(load.running)), self.costs.layer_s(tokens)
        slice_s = max(min(goals) - step_s, layer_s)
        return 1.0 + step_s / slice_s if slice_s > 0 else 1.0

    def _place_s(self, asked: Asked, load: Load) -> float:
        """How long until there is a place, and room in the KV cache, for all that wait and for ``asked``."""
        places = self.settings.max_batch - len(load.running) - len(load.waiting) - 1
        places -= load.coming.num_requests if load.coming else 0
        room = load.free - asked.room - sum(other.room for other in load.waiting)
        steps = 0
        for going in sorted(load.running, key=lambda going: going.left):
            if places >= 0 and room >= 0:
                break
            places, room, steps = places + 1, room + going.room, going.left
        return steps * self.costs.decode_s(len(load.running))
