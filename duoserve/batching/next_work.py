"""What a service does next: which requests to start, how far to take a prefill, which requests to refuse.

Pure functions of plain data. An objective for the first token has a deadline; one for later tokens is a mean, which a
request keeps if its last token comes in time.

All times are seconds on one clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf, isinf
from typing import NamedTuple

from duoserve.batching.cost import MeasuredCosts
from duoserve.interface import Objectives, ServiceSettings

# No step is planned to take longer than this, except a single layer: requests come, go and are cancelled between steps.
STEP_S = 0.05
# A request that has waited this long goes before all others, one such request in each pass.
PATIENCE_S = 10.0
# The credit of a running request is counted at most this many tokens ahead: it may stop before its last token.
AHEAD = 4
# Older measurements, on a service that has been idle since, say little of how long steps take now.
STALE_S = 5.0
# Work is planned for this share of an objective for later tokens: how long steps will take is not known exactly.
PLANNED = 0.95


class WaitingRequest(NamedTuple):
    """A request that waits, with ``num_prompt`` tokens of prompt. It starts with ``room`` tokens of the KV cache.

    It may get ``left`` tokens. ``sent_back`` is when it had to make way in the KV cache, None if it has not run yet.
    """

    arrived: float
    num_prompt: int
    room: int
    objectives: Objectives = Objectives()
    sent_back: float | None = None
    left: int = 1

    @property
    def patient_until(self) -> float:
        """The time from which on it is started before all others."""
        return PATIENCE_S + (self.arrived if self.sent_back is None else self.sent_back)


class RunningRequest(NamedTuple):
    """A request that runs: it got its first token at ``first_token``, has ``tokens`` now, and may get ``left`` more.

    When it ends it frees ``room`` tokens of the KV cache. Its objective ``tpot_s`` is a mean: a token that comes early
    lets a later one be late.
    """

    first_token: float
    tokens: int
    left: int
    room: int
    tpot_s: float | None = None

    def due(self, more: int, share: float = PLANNED) -> float:
        """When ``more`` further tokens are due, so that its mean stays within ``share`` of its objective."""
        return inf if self.tpot_s is None else self.first_token + (self.tokens - 1 + more) * share * self.tpot_s


class RunningPrefill(NamedTuple):
    """The prefill under way, with ``layers_left`` layers to compute. Its oldest request came at ``arrived``.

    Its requests have ``room`` tokens of the KV cache together, and none of them may get more than ``left`` tokens.
    """

    num_tokens: int
    num_requests: int
    layers_left: int
    arrived: float = inf
    room: int = 0
    left: int = 1


class Traffic(NamedTuple):
    """All that decides what is done next. ``free`` is the room in the KV cache that no request has, in tokens.

    ``measured`` is when the last measured step ended; None: just now.
    """

    now: float
    waiting: Sequence[WaitingRequest]
    running: Sequence[RunningRequest]
    free: int
    prefill: RunningPrefill | None = None
    measured: float | None = None

    @property
    def empty(self) -> bool:
        """Whether there is no request at all."""
        return not (self.waiting or self.running or self.prefill)


class Refusal(NamedTuple):
    """Why a request cannot be served in time, and after how many seconds another try is worthwhile."""

    why: str
    retry_after_s: float


@dataclass(frozen=True)
class Batching:
    """Decides, by ``settings`` and by how long work is expected to take on a model of ``num_layers`` layers."""

    settings: ServiceSettings
    costs: MeasuredCosts
    num_layers: int

    def start(self, traffic: Traffic) -> list[int]:
        """The indices in ``traffic.waiting`` to prefill together now. Must not be called during a prefill."""
        chosen: list[int] = []
        free, tokens, deadline = traffic.free, 0, inf
        for index in self.order(traffic):
            asked = traffic.waiting[index]
            soonest = min(deadline, self._deadline(asked, traffic.now))
            finished = traffic.now + self._prefill_s(tokens + asked.num_prompt)
            if not self._may_join([traffic.waiting[other] for other in chosen], asked, traffic):
                break
            if asked.room > free or (chosen and finished > soonest and not self._fcfs):
                if self._fcfs or self._start_by(asked, traffic.now) <= traffic.now:
                    break  # no request overtakes one that must start now
                continue
            chosen.append(index)
            free, tokens, deadline = free - asked.room, tokens + asked.num_prompt, soonest
        return chosen

    def order(self, traffic: Traffic) -> list[int]:
        """The order in which the waiting should start, indices of ``traffic.waiting``: by arrival, or by least slack.

        By slack, requests that cannot get their first token in time come last. The one that has waited longest comes
        first of all once its patience has ended.
        """
        indices = sorted(range(len(traffic.waiting)), key=lambda index: traffic.waiting[index].arrived)
        if self._fcfs or not indices:
            return indices
        late = [index for index in indices if self._late(traffic.waiting[index], traffic.now)]
        hopeful = sorted(set(indices) - set(late))
        hopeful.sort(key=lambda index: self._start_by(traffic.waiting[index], traffic.now))
        ordered = hopeful + late
        longest = min(indices, key=lambda index: traffic.waiting[index].patient_until)
        if traffic.waiting[longest].patient_until <= traffic.now:
            ordered.remove(longest)
            ordered.insert(0, longest)
        return ordered

    def layers(self, traffic: Traffic, decoded: bool) -> int:
        """How many layers of the prefill under way to compute now; 0: make a decode step first.

        The slice takes no longer than the running requests can spare; those that miss their objectives anyway do not
        count. Once the prefill's patience has ended, it gets one layer after each decode step all the same.
        ``decoded``: the last step was a decode step, or no request runs.
        """
        prefill = traffic.prefill
        assert prefill is not None
        layer_s = self.costs.layer_s(prefill.num_tokens)
        if layer_s == 0:
            return 1  # it has to be measured first
        most = min(max(1, int(STEP_S / layer_s)), prefill.layers_left)
        spare_s = inf if self._fcfs else self._spare_s(traffic)
        if spare_s < most * layer_s:
            most = max(int(spare_s / layer_s), int(decoded and prefill.arrived + PATIENCE_S <= traffic.now))
        return most

    def refusal(self, asked: WaitingRequest, traffic: Traffic) -> Refusal | None:
        """Why ``asked``, last in the queue, cannot meet its objectives; None if it can, or if that is not known.

        Costs are measured on served requests. If there are no others and the last measurement is old, ``asked`` is
        let through, so that costs are measured again.
        """
        if traffic.empty and traffic.measured is not None and traffic.now - traffic.measured > STALE_S:
            return None
        ttft_s, tpot_s = asked.objectives.ttft_s, asked.objectives.tpot_s
        if tpot_s is not None and self.costs.decode_s(1) > tpot_s:
            needed = self.costs.decode_s(1)
            return Refusal(f"a token takes {needed:.3g} s even alone, its objective is {tpot_s:.3g} s", needed)
        if ttft_s is None:
            return None
        ahead_s = self.first_token_s(asked, traffic)
        expected = traffic.now - asked.arrived + ahead_s
        if expected <= ttft_s:
            return None
        why = f"its first token is expected after {expected:.3g} s, its objective is {ttft_s:.3g} s"
        return Refusal(why, max(0.1, ahead_s - ttft_s))

    def first_token_s(self, asked: WaitingRequest, traffic: Traffic) -> float:
        """The seconds until ``asked`` can expect its first token, behind all requests that wait or are prefilled."""
        prefill = traffic.prefill
        begun = 0.0 if prefill is None else prefill.layers_left * self.costs.layer_s(prefill.num_tokens)
        tokens = asked.num_prompt + sum(other.num_prompt for other in traffic.waiting)
        work = begun + self._prefill_s(tokens)
        return self._seat_s(asked, traffic) + work * self._slowdown(traffic, tokens)

    @property
    def _fcfs(self) -> bool:
        return self.settings.scheduler == "fcfs"

    def _prefill_s(self, tokens: int) -> float:
        return self.num_layers * self.costs.layer_s(tokens)

    def _deadline(self, asked: WaitingRequest, now: float) -> float:
        """The time when the first token of ``asked`` is due; infinity without an objective that can still be met."""
        if asked.objectives.ttft_s is None:
            return inf
        due = asked.arrived + asked.objectives.ttft_s
        return due if now + self._prefill_s(asked.num_prompt) <= due else inf

    def _late(self, asked: WaitingRequest, now: float) -> bool:
        """Whether the first token of ``asked`` will be late even if it is started now."""
        return asked.objectives.ttft_s is not None and isinf(self._deadline(asked, now))

    def _start_by(self, asked: WaitingRequest, now: float) -> float:
        """The time when ``asked`` must start for its first token to be in time; at most when its patience ends."""
        in_time = self._deadline(asked, now) - self._prefill_s(asked.num_prompt)
        return min(in_time, asked.patient_until)

    def _may_join(self, chosen: Sequence[WaitingRequest], asked: WaitingRequest, traffic: Traffic) -> bool:
        """Whether ``asked`` may start too: the larger batch makes no request miss its objective for later tokens."""
        num_ahead = len(traffic.running) + len(chosen) + (traffic.prefill.num_requests if traffic.prefill else 0)
        if num_ahead >= self.settings.max_batch:
            return False
        if self._fcfs or num_ahead == 0:
            return True
        step_s, alone_s = self.costs.decode_s(num_ahead + 1), self.costs.decode_s(1)
        goals = [PLANNED * (one.objectives.tpot_s or inf) for one in (*chosen, asked)]
        if step_s > min((goal for goal in goals if goal >= alone_s), default=inf):
            return False
        begun = traffic.now + self._prefill_s(asked.num_prompt + sum(one.num_prompt for one in chosen))
        return all(begun + going.left * step_s <= going.due(going.left) for going in self._kept(traffic))

    def _largest_batch(self, asked: WaitingRequest, traffic: Traffic) -> int:
        """How many requests may run at once, ``asked`` among them, so that their objectives can be met."""
        most = self.settings.max_batch
        goals = [goal for one in traffic.running if (goal := one.tpot_s) is not None] + [asked.objectives.tpot_s or inf]
        goal = min((PLANNED * goal for goal in goals if PLANNED * goal >= self.costs.decode_s(1)), default=inf)
        if self._fcfs or self.costs.decode_s(most) <= goal:
            return most
        return next(size for size in count(1) if self.costs.decode_s(size + 1) > goal)

    def _kept(self, traffic: Traffic) -> list[RunningRequest]:
        """The running requests that can keep their objectives for later tokens, if only decode steps follow.

        They are held against the whole objective, not the PLANNED share: a request that has just joined a batch whose
        steps take all of that share would be given up at once.
        """
        now, step_s = traffic.now, self.costs.decode_s(len(traffic.running))
        return [going for going in traffic.running if now + going.left * step_s <= going.due(going.left, share=1.0)]

    def _spare_s(self, traffic: Traffic) -> float:
        """The seconds that the next decode step can wait before a running request misses its objective."""
        step_s = self.costs.decode_s(len(traffic.running))
        steps = ((min(going.left, AHEAD), going) for going in self._kept(traffic))
        return max(0.0, min((going.due(ahead) - ahead * step_s for ahead, going in steps), default=inf) - traffic.now)

    def _slowdown(self, traffic: Traffic, tokens: int) -> float:
        """How many times as long a prefill takes with decode steps between its slices; at least 1."""
        goals = [going.tpot_s for going in traffic.running if going.tpot_s is not None]
        if self._fcfs or not goals:
            return 1.0
        step_s, layer_s = self.costs.decode_s(len(traffic.running)), self.costs.layer_s(tokens)
        slice_s = max(min(goals) - step_s, layer_s)
        return 1.0 + step_s / slice_s if slice_s > 0 else 1.0

    def _seat_s(self, asked: WaitingRequest, traffic: Traffic) -> float:
        """The seconds until ``asked`` can start, when it and all before it have a seat and room in the KV cache.

        Each request is taken to keep its seat until it has all the tokens that it may get.
        """
        ends = [(going.left, 1, going.room) for going in traffic.running]  # steps until they end; seats and room then
        if traffic.prefill is not None:
            ends.append((traffic.prefill.left, traffic.prefill.num_requests, traffic.prefill.room))
        heapify(ends)
        started, largest = sum(num for _, num, _ in ends), self._largest_batch(asked, traffic)
        seats, room, steps = largest - started, traffic.free, 0
        for one in (*traffic.waiting, asked):
            while ends and (seats < 1 or room < one.room):
                steps, num, freed = heappop(ends)
                seats, room = seats + num, room + freed
            seats, room = seats - 1, room - one.room
            heappush(ends, (steps + one.left, 1, one.room))
        batch = max(len(traffic.running), min(largest, started + len(traffic.waiting)))
        return steps * self.costs.decode_s(batch)
