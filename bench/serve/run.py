"""One cell of the serving table: a model put together for it, a request that warms up, and the one that is measured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from duoserve.architecture import LatentAttentionConfig
from duoserve.config import EngineConfig
from duoserve.engine import Engine
from duoserve.errors import ConfigError, MemoryBudgetError
from duoserve.experts.budget import FreeMemory, MemoryPlan
from duoserve.experts.device import CPU, free_bytes
from duoserve.experts.layout import ExpertId
from duoserve.experts.slots import SlotPool
from duoserve.experts.tickets import PIECE_BYTES
from duoserve.kv_cache import PagedKVCache
from duoserve.launching.launch import Launch, StepParts, choose_launch, resolve_mode
from duoserve.launching.link import LinkRates
from duoserve.launching.recorded import RECORD_AFTER
from duoserve.loading.memory_needs import MemoryNeeds
from duoserve.loading.wiring import make_scheduler
from duoserve.models.decoder import RoutedExperts
from duoserve.models.listening import listened_to
from duoserve.models.variants import with_script
from duoserve.predictors.lookahead import LookaheadPredictor
from duoserve.request import Request
from duoserve.sampling import SamplingParams
from duoserve.scheduling.policies import Policy
from duoserve.scheduling.scheduler import Scheduler
from serve.cells import Cell, Part
from serve.digest import NotedPasses, digest
from serve.host import Host
from serve.models import Unavailable, Wired
from serve.replay import AskedFor, HostArena, ReplayedPasses, RoutingReplay, SharedRows, Tape, TapedScores
from serve.steps import StallMeter, TimedRunner, timed_runner
from serve.timeline import packed, timeline

# Of a prompt and of a decode: their logits must have the same bits in every cell of a group.
CHECKED_TOKENS, CHECKED_STEPS = 16, 8
Figures = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How long a cell is measured: ``steps`` of decode, but no more than ``seconds`` once there are ``least``.

    Of steps that are recorded there are ``least_recorded``, and then ``timed`` more, which are timed one by one.
    """

    steps: int = 128
    seconds: float = 1.5
    least: int = 3
    least_recorded: int = 16
    timed: int = 8

    @property
    def most(self) -> int:
        """Decode steps that a request has room for."""
        return self.steps + self.timed

    def to_warm_up(self) -> Limits:
        """For the request before: it compiles, records, and fills the slots with what another request left.

        It may take as many steps, since the pages of all of them are kept at once, and their number is part of the
        shape that is recorded.
        """
        return replace(self, seconds=self.seconds / 3, least_recorded=RECORD_AFTER + 2)

    def of(self, launch: Launch) -> Limits:
        """For steps that are launched so."""
        return self if launch is Launch.MODEL else replace(self, least=self.least_recorded)


@dataclass(frozen=True)
class Served:
    """A model that is ready for requests."""

    engine: Engine
    meter: StallMeter
    scheduler: Scheduler
    replay: RoutingReplay
    replayed: ReplayedPasses
    passes: NotedPasses
    asked_for: AskedFor
    launch: Launch
    runner: TimedRunner | None

    @property
    def num_recordings(self) -> int:
        """Steps that were recorded so far."""
        return self.runner.num_recordings if self.runner is not None else 0

    @property
    def resident(self) -> set[ExpertId]:
        """The experts that are in slots now."""
        return {expert for _, expert in self.scheduler.table.ready()}


class KnownLink:
    """The rates at which a model's experts come, measured when they are first asked for."""

    def __init__(self) -> None:
        self._rates: LinkRates | None = None

    def rates(self, parts: StepParts) -> LinkRates:
        """As ``parts.measure_link``, which destroys what is in the first slots."""
        if self._rates is None:
            self._rates = parts.measure_link()
        return self._rates


@dataclass(frozen=True)
class Ground:
    """What a cell stands on: the machine, the model, its link, the experts' memory, both tapes, and what guesses."""

    host: Host
    model: Wired
    link: KnownLink
    arena: HostArena
    warm: Tape
    measured: Tape
    guesser: LookaheadPredictor

    @property
    def num_moe_layers(self) -> int:
        """Layers that have experts."""
        return len(self.model.config.moe_layers)

    def plan(self, cell: Cell, policy: Policy, max_context: int) -> MemoryPlan:
        """As ``from_pretrained`` makes it; Unavailable with its arithmetic where it does not fit."""
        model, device = self.model, self.host.device
        needs = MemoryNeeds(model.config, model.layout, model.dense_bytes, model.config.dtype, device, max_context)
        wanted = EngineConfig(expert_slots=cell.share, host_memory=0)
        free = FreeMemory(free_bytes(device), free_bytes(CPU) if self.host.pins else None)
        try:
            return needs.plan(wanted, free, needs_all=policy.all_resident)
        except MemoryBudgetError as error:
            raise Unavailable(str(error)) from error

    @contextmanager
    def served(self, plan: MemoryPlan, policy: Policy, part: Part, max_context: int, mode: str) -> Iterator[Served]:
        """The model with ``policy`` in decode mode ``mode``; all of it is given back at the end.

        Unavailable for what this machine cannot have.
        """
        if part.whole_rows and not self.host.pins:
            raise Unavailable("copy threads read whole rows")
        config, device = self.model.config, self.host.device
        store = SharedRows(self.arena, self.model.layout, config.num_experts)
        meter, pool = StallMeter(), SlotPool(plan.num_slots, store.layout, device=device)
        piece_bytes = plan.slot_bytes if part.whole_rows else PIECE_BYTES
        copies = self.host.copy_engine(store, pool, meter, piece_bytes)
        predictor = self._predictor(policy)
        with ExitStack() as resources:
            scheduler = make_scheduler(config, pool, copies, policy, meter, resources, predictor=predictor)
            asked_for = AskedFor(scheduler)
            built = self.model.family.build(config, self.model.reader(device), RoutedExperts(asked_for, pool.weights))
            replay = RoutingReplay(self.warm, config.moe_layers)
            heard_by = None if scheduler.listener is None else TapedScores(scheduler.listener, replay)
            model, tap = listened_to(with_script(built, replay), heard_by)
            cache = PagedKVCache(config, max_context, config.dtype, device)
            parts = StepParts(model, cache, scheduler, store, pool)
            launch = self._launch(mode, policy, parts)
            runner = None if launch is Launch.MODEL else timed_runner(launch, parts, self.host.recorder())
            replayed = ReplayedPasses(scheduler, replay)
            passes = NotedPasses(model, replayed, cache, meter, tap=tap, runner=runner)
            engine = Engine(passes, config, cache, meter)
            yield Served(engine, meter, scheduler, replay, replayed, passes, asked_for, launch, runner)

    def _launch(self, mode: str, policy: Policy, parts: StepParts) -> Launch:
        try:
            resolved = resolve_mode(mode, self.host.device)
            return choose_launch(resolved, self.host.device, policy, parts.readable, lambda: self.link.rates(parts))
        except ConfigError as error:
            raise Unavailable(str(error)) from error

    def _predictor(self, policy: Policy) -> LookaheadPredictor | None:
        """A new one, by the model's layer numbers, for a policy that guesses, whichever kind that would like best."""
        if policy.predictor is None:
            return None
        known = self.guesser
        meta = replace(known.meta, layers=self.model.config.moe_layers)
        return LookaheadPredictor(meta, known.popularity_LE, known.slopes_L, known.offsets_L)


def run(cell: Cell, ground: Ground, limits: Limits) -> Figures:
    """Figures of one cell; Unavailable for what cannot be."""
    policy, part = cell.switched()
    max_context = _max_context(cell, limits)
    bytes_before = ground.host.reset_peak()
    plan = ground.plan(cell, policy, max_context)
    with ground.served(plan, policy, part, max_context, cell.mode) as served:
        _request(served, ground.warm, cell, ground.host, limits.to_warm_up().of(served.launch))
        recorded, resident = served.num_recordings, served.resident
        figures = _request(served, ground.measured, cell, ground.host, limits.of(served.launch), limits.timed)
        figures["recorded_while_timed"] = served.num_recordings - recorded
        asked = served.asked_for.experts[ground.num_moe_layers :]  # behind the prompt's
        digests = {
            "logits": _digest(served, ground.measured, cell),
            "decoded_logits": _decode_digest(served, ground.measured, cell, limits),
        }
        peak = ground.host.peak_bytes()
    every_step = ground.measured.experts(len(figures["tokens"][0]) - 1)
    return (
        figures
        | digests
        | {
            "slots": plan.num_slots,
            "slot_bytes": plan.slot_bytes,
            "launch": served.launch.value,
            "guesses": "" if policy.predictor is None else ground.guesser.name,
            "planned_bytes": plan.total_bytes,
            "peak_bytes": None if peak is None else peak - bytes_before,
            "needed_bytes": plan.slot_bytes * len(_wanted(ground) - resident),
            "asked": sum(map(len, every_step[: figures["steps"] * ground.num_moe_layers])),
            "as_taped": [set(experts) for experts in asked] == every_step if len(asked) == len(every_step) else None,
            "layers": ground.num_moe_layers,
            "dense_active_bytes": ground.model.active_dense_elements * ground.model.config.dtype.itemsize,
            "flop": prefill_flop(ground.model, ground.num_moe_layers, cell),
        }
    )


def trace(cells: Sequence[Cell], ground: Ground, limits: Limits) -> Figures:
    """The timeline of a decode step of each cell, as ``serve/timeline.py`` packs it; Unavailable for what cannot be.

    Whoever traces measures nothing afterwards in the same process: the profiler may stay with the device.
    """
    with ExitStack() as stack:
        steps = {cell.name: partial(next, stack.enter_context(_decoding(cell, ground, limits))) for cell in cells}
        events = timeline(steps, ground.host.device)
    return {"events": len(events), "trace": packed(events)}


@contextmanager
def _decoding(cell: Cell, ground: Ground, limits: Limits) -> Iterator[Iterator[None]]:
    """The decode steps of a cell behind its first ones."""
    policy, part = cell.switched()
    max_context = _max_context(cell, limits)
    plan = ground.plan(cell, policy, max_context)
    with ground.served(plan, policy, part, max_context, cell.mode) as served:
        _request(served, ground.warm, cell, ground.host, limits.to_warm_up().of(served.launch))
        served.replay.play(ground.measured)
        requests = requests_of(cell, limits, len(ground.measured.ids_SLRK))
        with closing(served.engine.generate(requests)) as tokens:
            steps = _steps(tokens, cell.batch)
            for _ in range(1 + limits.least):
                next(steps)
            yield steps


def _max_context(cell: Cell, limits: Limits) -> int:
    return cell.batch * PagedKVCache.whole_pages(cell.prompt + limits.most + 1)


def _wanted(ground: Ground) -> set[ExpertId]:
    """The experts that the measured prompts are routed to."""
    by_layer = zip(ground.model.config.moe_layers, ground.measured.prompt_experts(), strict=True)
    return {ExpertId(layer, expert) for layer, experts in by_layer for expert in experts}


def prefill_flop(model: Wired, num_moe_layers: int, cell: Cell) -> int:
    """Operations of the prompts' matrix products and of attention's lower half; of the head only what is used."""
    config, tokens = model.config, cell.prompt * cell.batch
    head = config.vocab_size * config.hidden_size
    expert = 3 * config.hidden_size * config.expert_intermediate_size
    per_token = model.active_dense_elements - head + num_moe_layers * config.top_k * expert
    heads = config.blocks.attention
    values = heads.num_heads * heads.value_dim if isinstance(heads, LatentAttentionConfig) else heads.width
    attention = config.num_layers * (heads.width + values) * cell.prompt * tokens
    return 2 * (tokens * per_token + cell.batch * head) + attention


def _request(served: Served, tape: Tape, cell: Cell, host: Host, limits: Limits, num_timed: int = 0) -> Figures:  # noqa: PLR0913, PLR0917
    """One request of ``cell.batch`` prompts, for ``limits.steps`` of decode or as long as there is time.

    ``num_timed`` steps that are timed one by one come behind these, whose figures they would change.
    """
    served.replay.play(tape)
    served.asked_for.experts.clear()
    requests = requests_of(cell, limits, len(tape.ids_SLRK))
    energy, most = [host.joules()], requests[0].params.max_tokens - 1 - limits.timed
    with closing(served.engine.generate(requests)) as tokens:
        steps = _steps(tokens, cell.batch)
        next(steps)
        first, began, made = served.meter.snapshot(), time.perf_counter(), 0
        energy.append(host.joules())
        while made < most and (made < limits.least or time.perf_counter() - began <= limits.seconds):
            next(steps)
            made += 1
        stats = served.meter.snapshot()
        energy.append(host.joules())
        timed = _timed_steps(served, steps, num_timed)
    return {
        "steps": made,
        "prefill": first.to_dict(),
        "stats": stats.to_dict(),
        "timed": timed,
        "tokens": [request.output_ids for request in requests],
        "joules": energy,
    }


def _steps(tokens: Iterable[object], batch: int) -> Iterator[None]:
    """A step at a time: the first tokens of all sequences, then the next one of each."""
    for made, _ in enumerate(tokens, 1):
        if made % batch == 0:
            yield


def _timed_steps(served: Served, steps: Iterator[None], num: int) -> Figures | None:
    """Times of ``num`` more steps, as ``host_seconds`` takes them; None where steps are not recorded."""
    if served.runner is None or not num:
        return None
    meter, replayed = served.meter, served.replayed
    wall_s, stall_s, replay_s = meter.snapshot().wall_s, meter.device_stall_s, replayed.seconds
    with served.runner.timing() as times:
        for _ in range(num):
            next(steps)
    found = times.to_dict() | {"wall_s": meter.snapshot().wall_s - wall_s, "stall_s": meter.device_stall_s - stall_s}
    found["aside_s"] += replayed.seconds - replay_s
    return found if times.steps == num else None


def requests_of(cell: Cell, limits: Limits, taped_steps: int, prompt: int | None = None) -> list[Request]:
    """The cell's prompts, each followed by a token and one for each step; of their first ``prompt`` tokens, if told.

    All have the same room whatever is told: the number of a request's pages is part of the shape that is recorded.
    """
    taken = cell.prompt if prompt is None else prompt
    tokens = min(limits.most, taped_steps) + 1 + cell.prompt - taken
    settings = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return [Request(_prompt(cell, row)[:taken], settings) for row in range(cell.batch)]


def _prompt(cell: Cell, row: int) -> list[int]:
    """Token ids; the routing is the tape's, so they are of no consequence but for the bits."""
    return [(7 * at * at + 31 * row + at) % 300 + 3 for at in range(cell.prompt)]


def _digest(served: Served, tape: Tape, cell: Cell) -> str:
    """Of the bits of the logits of a prompt's beginning."""
    served.replay.play(tape)
    return digest([served.engine.forward(_prompt(cell, 0)[:CHECKED_TOKENS])])


def _decode_digest(served: Served, tape: Tape, cell: Cell, limits: Limits) -> str:
    """Of the bits of the logits of decode steps behind one token; recorded ones where the cell's are."""
    served.replay.play(tape)
    requests = requests_of(cell, limits, len(tape.ids_SLRK), prompt=1)
    logits: list[Tensor] = []
    with closing(served.engine.generate(requests)) as tokens:
        steps = _steps(tokens, cell.batch)
        next(steps)
        for _ in range(CHECKED_STEPS):
            next(steps)
            assert served.passes.logits_BV is not None
            logits.append(served.passes.logits_BV.clone())
    return digest(logits)
