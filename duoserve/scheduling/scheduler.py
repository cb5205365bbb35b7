"""What moves when: the scheduler asks the pure parts of its policy for plans and carries them out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from tqdm import tqdm

from duoserve.config import Phase
from duoserve.errors import ClosedError, IntegrityError, MemoryBudgetError
from duoserve.experts.copy_engine import CopyEngine
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool, SlotTable
from duoserve.experts.tickets import Priority
from duoserve.metrics import Meter
from duoserve.scheduling.decode import plan_decode
from duoserve.scheduling.foresight import Foresight
from duoserve.scheduling.ghost import Ghost
from duoserve.scheduling.guard import Guard
from duoserve.scheduling.lease import OpenLease, SlotLease, StandingLease
from duoserve.scheduling.link_budget import Demand
from duoserve.scheduling.plan import BEFORE_FIRST, LayerPlan, LayerView, ModelShape
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.predictor import Predictor
from duoserve.scheduling.prefill import plan_prefill, ring_size
from duoserve.scheduling.ranking import Ranking
from duoserve.scheduling.read_through import ReadThrough
from duoserve.scheduling.residency import Residency
from duoserve.scheduling.routing import RoutingListener
from duoserve.scheduling.source import ExpertSource, ReadyExpert
from duoserve.scheduling.spaces import Cache, Ring, Space, Uncached
from duoserve.scheduling.step_guesses import StepGuesses

# Copies in the queue while all experts are loaded: enough for every copy thread to have its next one waiting.
LOAD_AHEAD = 16


@dataclass(eq=False, slots=True)
class _Pass:
    """A forward pass that has begun, and the lease that was opened last in it."""

    phase: Phase
    num_tokens: int
    space: Space
    lease: OpenLease | None = None


class Scheduler(ExpertSource):
    """Brings experts into slots for one forward pass at a time: ``begin``, ``acquire`` layer by layer, ``end``.

    The slots are those of an empty ``pool``, which it alone changes, as it does ``copies`` (which ``close`` closes).
    MemoryBudgetError if ``policy`` wants all experts resident and the slots are fewer. What ``predictor`` says goes
    into decode steps if the policy makes guesses. ``table`` says which expert is in which slot, for others to read
    only. Not thread-safe.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        shape: ModelShape,
        pool: SlotPool,
        copies: CopyEngine,
        policy: Policy,
        meter: Meter,
        predictor: Predictor | None = None,
    ) -> None:
        self._shape = shape
        self._policy = policy
        self._num_slots = pool.num_slots
        if policy.all_resident and pool.num_slots < shape.total_experts:
            raise MemoryBudgetError(
                f"policy {policy.name!r} keeps all {shape.total_experts} experts in slots "
                f"({len(shape.layers)} layers x {shape.num_experts}), but there are {pool.num_slots} slots: "
                "give the experts more memory or choose another policy"
            )
        self._copies = copies
        self._meter = meter
        self._foresight = Foresight(predictor, policy.guesses, shape)
        self._link = self._foresight.link if self._foresight.guesses_within_budget else None
        self._guard = self._new_guard()
        self._ranking: Ranking = self._guard or policy.eviction.ranking(shape.depth, shape.num_experts)
        self.table = SlotTable(shape.depth, shape.num_experts, pool.num_slots)
        self._residency = Residency(self.table, pool, copies, meter, link=self._link)
        self._cache = Cache(self._residency, self._shape, policy.eviction, self._ranking)
        self._pass: _Pass | None = None
        self._aside: _Pass | None = None  # a prefill that will be resumed
        self._read_through: ReadThrough | None = None
        self._ghosts_outdated = True  # a prefill has changed the slots: the guard's ghosts must begin anew
        self._under_way = False  # from a pass's beginning until it has ended, or was cut short and cleaned up after
        self._closed = False

    @property
    def listener(self) -> RoutingListener | None:
        """What must hear of passes before ``begin`` and of routings before ``prefetch``; None without guesses."""
        return self._foresight if self._foresight.guesses_at_all else None

    def begin(self, phase: Phase, num_tokens: int) -> None:
        """A forward pass of ``num_tokens`` tokens begins. ClosedError after ``close``."""
        self._check_between_passes("a forward pass began")
        if self._aside is not None and phase is Phase.PREFILL:
            raise IntegrityError("a prefill began before the one that was set aside had ended")
        self._under_way = True
        if phase is Phase.PREFILL:
            self._pause()
        self._ranking.begin(phase, num_tokens)
        if self._guard is not None and phase is Phase.DECODE and self._ghosts_outdated:
            self._guard.become(self.table.slots)
        self._ghosts_outdated = phase is Phase.PREFILL
        self._pass = _Pass(phase, num_tokens, self._open_space(phase, num_tokens))
        try:
            self._residency.collect()
            self._open_lease(self._pass, BEFORE_FIRST, ())
        except BaseException:
            self.end()
            raise

    def set_aside(self) -> None:
        """The prefill that is under way will be resumed; until then decode passes may come and go.

        Its ring keeps its slots, and the copies ahead go on, unless that would leave decode steps less than half of the
        slots, or the device carries those out by itself.
        """
        run = self._pass
        if run is None or run.phase is not Phase.PREFILL or run.lease is None or not run.lease.idle:
            raise IntegrityError("only a prefill that has computed all it asked for can be set aside")
        lent = run.space.set_aside() if isinstance(run.space, Ring) else frozenset()
        if 2 * len(lent) <= self._num_slots and self._read_through is None:
            self._cache.lent = lent
        if not self._cache.lent:
            self._residency.drain()
        self._pass, self._aside = None, run
        self._under_way = False

    def resume(self) -> None:
        """The prefill that was set aside goes on behind the last layer that it asked for."""
        self._check_between_passes("a prefill was resumed")
        if self._aside is None:
            raise IntegrityError("a prefill was resumed, but none had been set aside")
        self._under_way = True
        run, self._aside = self._aside, None
        lent, self._cache.lent = self._cache.lent, frozenset()
        self._ghosts_outdated = True
        self._pause()
        self._ranking.resume(run.phase, run.num_tokens)
        if lent and isinstance(run.space, Ring):
            self._residency.collect()
            run.space.take_up()
        else:
            run.space = self._open_space(run.phase, run.num_tokens)
        self._pass = run

    def give_up_aside(self) -> None:
        """The prefill that was set aside will not be resumed: what its ring holds is for decode steps from now on."""
        self._check_between_passes("a prefill was given up")
        if self._aside is None:
            raise IntegrityError("a prefill was given up, but none had been set aside")
        self._under_way = True
        self._aside = None
        if self._cache.lent:
            self._cache.lent, self._ghosts_outdated = frozenset(), True
            self._pause()
            self._residency.drain()
        self._under_way = False

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> OpenLease:
        """See ExpertSource: what is missing has been asked for, as far as there are slots, when this returns."""
        self._check_open()
        run = self._pass
        if run is None:
            raise IntegrityError(f"layer {layer} asked for experts outside of a forward pass")
        if run.lease is not None and not run.lease.idle:
            raise IntegrityError(f"layer {layer} asked for experts while another lease was open")
        if self._policy.all_resident and self._residency.is_complete(layer, self._shape.num_experts):
            slots = self.table.slots[layer]
            self._meter.hit(run.phase, len(experts))
            run.lease = StandingLease(layer, [ReadyExpert(expert, slots[expert]) for expert in experts])
            return run.lease
        self._ranking.used(layer, experts, [1] * len(experts) if counts is None else counts)
        self._residency.collect()  # first, for the link must know when the last copies of the layer before arrived
        if self._link is not None and run.phase is Phase.DECODE:
            self._link.routed(layer, self._copies.now())
        lease, num_ready = self._open_lease(run, layer, experts)
        self._meter.hit(run.phase, num_ready)
        self._meter.miss(run.phase, len(experts) - num_ready)
        return lease

    def end(self) -> None:
        """The forward pass has ended, well or not: it holds no slot any more. What is set aside stays so.

        Copies ahead of the next pass go on. After a pass that did not come to the end of its last layer all copies are
        cancelled or waited for, so that every slot is EMPTY or READY. Does nothing outside of a pass. If it is cut
        short itself, by a KeyboardInterrupt for one, what begins next does the rest.
        """
        run, self._pass = self._pass, None
        if not self._under_way:
            return
        lease = None if run is None else run.lease
        if lease is not None:
            lease.close()
        by_device = self._read_through is not None and self._read_through.ended()
        if not (by_device or (lease is not None and lease.complete and lease.layer == self._shape.layers[-1])):
            self._restore()
        self._residency.settle()  # what was measured belongs to this pass
        self._under_way = False

    def end_all(self) -> None:
        """As ``end``; what is set aside is given up too. Nothing is under way then."""
        self.end()
        if self._aside is not None:
            self.give_up_aside()

    def read_through(self) -> ReadThrough:
        """Makes the books of decode steps that the device carries out by itself, within passes of this scheduler."""
        guesses = StepGuesses(self._residency, self._shape, self._foresight, self._copies.now)
        self._read_through = ReadThrough(
            self._residency,
            self._cache,
            self._shape,
            self._meter,
            self._ranking.used,
            guesses,
            may_miss=not self._policy.all_resident,
        )
        return self._read_through

    def load_all(self, progress: bool = False) -> None:
        """Brings every expert into a slot, as far as there are slots; CopyError if one cannot be read.

        What has been measured of their copies by then is reported, and not left to the first pass.
        """
        self._check_between_passes("all experts were asked for")
        self._under_way = True
        absent = [expert for expert in self._shape.all_experts() if self.table.slot_of(expert) < 0]
        loads = deque(zip(absent, self.table.empty_slots(), strict=False))
        try:
            with tqdm(total=len(loads), desc="experts to slots", unit="expert", disable=not progress) as bar:
                self._load(loads, bar)
        except BaseException:
            self.end()
            raise
        self._residency.settle()
        self._under_way = False

    def check_integrity(self) -> None:
        """Compares the books of the slots; IntegrityError if they disagree, or a slot is held between passes."""
        self.table.check_integrity()
        held = self.table.held()
        if self._pass is None and held:
            raise IntegrityError(f"slots {held} are held, but no forward pass is under way")

    def close(self) -> None:
        """Ends the pass and closes the copy engine; idempotent."""
        self._closed = True
        self._aside = None
        self.end()
        self._copies.close()
        self._residency.collect()

    def _new_guard(self) -> Guard | None:
        """A guard if the eviction has a rival, or if it must be known what guesses cost; else None."""
        eviction, shape, num_slots = self._policy.eviction, self._shape, self._num_slots
        if eviction.rival is None and self._link is None:
            return None
        own = eviction.ranking(shape.depth, shape.num_experts)
        rival = None if eviction.rival is None else eviction.rival(shape.depth, shape.num_experts)
        return Guard(own, rival, lambda: Ghost(eviction, shape, num_slots))

    def _pause(self) -> None:
        """A prompt comes between decode steps: what they say of the link's idle time would be wrong."""
        self._foresight.link.pause()
        if self._read_through is not None:
            self._read_through.pause()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the scheduler was used after close()")

    def _check_between_passes(self, event: str) -> None:
        self._check_open()
        if self._pass is not None:
            raise IntegrityError(f"{event} before the last forward pass ended")
        self.end()  # of what was cut short before there was a pass, or behind it

    def _restore(self) -> None:
        """Cleans up after what was cut short, so that the slots are as they are between passes.

        Only a prefill that is set aside keeps the slots that were lent to it.
        """
        self._residency.restore()
        if self._aside is None:
            self._cache.lent = frozenset()

    def _load(self, loads: deque[tuple[ExpertId, int]], bar: tqdm[NoReturn]) -> None:
        while loads or self._residency.under_way():
            while loads and len(self._residency.under_way()) < LOAD_AHEAD:
                self._residency.load(*loads.popleft(), Priority.DEMAND)
            for ticket in self._residency.wait(self._residency.under_way()):
                if ticket.error is not None:
                    raise ticket.error
                bar.update()

    def _open_space(self, phase: Phase, num_tokens: int) -> Space:
        if phase is Phase.PREFILL and self._policy.prefill.has_ring:
            return self._open_ring(num_tokens)
        return self._cache if self._policy.keeps else Uncached(self._residency, self._cache.lent)

    def _open_ring(self, num_tokens: int) -> Ring:
        """A ring of EMPTY slots, for which the least valuable experts are given up where there are too few."""
        self._residency.drain()
        num_absent = self._shape.total_experts - sum(self._residency.filled())
        size = ring_size(self._policy.prefill, self._shape, num_tokens, self._num_slots, num_absent)
        for _ in range(size - len(self.table.empty_slots())):
            self._cache.give_up(BEFORE_FIRST)
        slots = self.table.empty_slots()
        return Ring(self._residency, self._shape, size, slots if self._policy.keeps else slots[:size])

    def _open_lease(self, run: _Pass, layer: int, wanted: Sequence[int]) -> tuple[SlotLease, int]:
        plan_prefetch = self._with_guesses if run.phase is Phase.DECODE and self._foresight.guesses_at_all else None
        lease = run.lease = SlotLease(self._residency, run.space, self._plan(run, layer, wanted), plan_prefetch)
        return lease, lease.start(wanted)

    def _plan(self, run: _Pass, layer: int, wanted: Sequence[int]) -> LayerPlan:
        slots = self.table.slots
        if self._policy.looks_ahead(run.phase):
            present = {other: slots[other] for other in self._shape.layers}
        else:
            present = {layer: slots[layer]} if layer != BEFORE_FIRST else {}
        view = LayerView(layer, tuple(wanted), present, run.num_tokens, run.space.ring_view(layer))
        if run.phase is Phase.PREFILL:
            return plan_prefill(self._policy.prefill, view, self._shape)
        plan = plan_decode(self._policy.decode, view, self._shape, self._foresight.so_far(layer))
        if self._link is not None and self._guard is not None and layer != BEFORE_FIRST:
            unguessed, alone = self._guard.missed, not self._residency.ledger.guesses
            self._link.demanded(Demand(len(wanted), len(plan.demand), unguessed, alone))
        return plan

    def _with_guesses(self, plan: LayerPlan) -> LayerPlan:
        """The plan of a decode step's layer, once its routing has been heard."""
        ledger = self._residency.ledger
        guesses = self._foresight.guess(plan.layer, self.table.slots, ledger.guesses, ledger.unused)
        return plan._replace(prefetch=guesses.copies, ahead=guesses.ahead, spared=guesses.spared)
