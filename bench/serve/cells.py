"""What is served: which model, policy, slots, prompt and batch each row of the table has, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from duoserve.config import DECODE_MODES
from duoserve.scheduling.plan import DecodeFetch, PrefillFetch
from duoserve.scheduling.policies import POLICIES, Policy, get_policy
from serve.models import BF16, MODELS

SHARES = ("12.5%", "25%", "45%", "15%")  # the last is the memory share of arXiv 2509.07379
PAPER_SHARE, MIDDLE_SHARE = "15%", "25%"
ALL = "100%"
PROMPTS, BATCHES = (128, 2048, 8192), (1, 4, 12)
AUTO, EVENT, GRAPH = (mode for mode in DECODE_MODES if mode != "compiled")  # which is for CPUs
BASE, BEST = "lru", "duoserve"  # most parts are switched off of the first


@dataclass(frozen=True)
class Part:
    """A part that can be switched off: of the policy ``base``, of the copy engine or of the memory."""

    name: str
    of_policy: Callable[[Policy], Policy] = lambda policy: policy
    whole_rows: bool = False
    pageable: bool = False
    base: str = BASE


PARTS = {
    part.name: part
    for part in (
        Part("prefill not overlapped", lambda policy: replace(policy, prefill=PrefillFetch.ON_DEMAND)),
        Part("nothing kept", lambda policy: replace(policy, keeps=False)),
        Part("residents wait for misses", lambda policy: replace(policy, decode=DecodeFetch.ON_DEMAND)),
        Part("no quota for layers", lambda policy: replace(policy, eviction=replace(policy.eviction, per_layer=False))),
        Part("no guesses", Policy.without_guesses, base=BEST),
        Part("prefetches in one piece", whole_rows=True),
        Part("pageable host memory", pageable=True),
    )
}


@dataclass(frozen=True)
class Cell:
    """One row. ``without`` names the part that is off; ``mode`` is the engine's decode mode."""

    model: str
    policy: str
    share: str
    prompt: int = PROMPTS[0]
    batch: int = 1
    without: str = ""
    mode: str = AUTO
    format: str = BF16

    @property
    def name(self) -> str:
        """As it stands in the report."""
        off = f", {self.without}" if self.without else ""
        mode = f", {self.mode}" if self.mode != AUTO else ""
        return (
            f"{self.model} {self.format}, {self.policy}{off}{mode}, {self.share}, prompt {self.prompt} x {self.batch}"
        )

    @property
    def group(self) -> tuple[str, int, int]:
        """Cells of one group compute the same."""
        return f"{self.model} {self.format}", self.prompt, self.batch

    def to_dict(self) -> dict[str, Any]:
        """For the worker and the result file."""
        return asdict(self)

    @property
    def is_whole(self) -> bool:
        """Whether no part is off, and decode steps are launched as the engine would."""
        return not self.without and self.mode == AUTO

    def switched(self) -> tuple[Policy, Part]:
        """The policy with its part off, and the part."""
        part = PARTS.get(self.without, Part(""))
        return part.of_policy(get_policy(self.policy)), part


def cells(models: Sequence[str] = tuple(MODELS)) -> list[list[Cell]]:
    """Every cell of ``models`` in stages, what matters most first, for a run may be cut short.

    Policies that keep nothing do the same at every budget, so they are run at the paper's; others but BASE at that and
    at a quarter of the experts, where all else is varied too. A batch is one of short prompts.
    """
    by_model = [_stages(model) for model in models]
    return [[cell for stages in by_model for cell in stages[at]] for at in range(len(by_model[0]))]


def promised(model: str) -> tuple[Cell, list[Cell]]:
    """What most promises are about: the cell that accelerate is held against, and the ways to launch and extremes."""
    return Cell(model, BASE, PAPER_SHARE), [
        *shown(model),
        Cell(model, "resident", ALL),
        Cell(model, "on-demand", PAPER_SHARE),
    ]


def shown(model: str, modes: Sequence[str] = (EVENT, GRAPH)) -> list[Cell]:
    """Both ways to launch a step, by which one is shown as a timeline."""
    return [Cell(model, BASE, MIDDLE_SHARE, mode=mode) for mode in modes]


def _stages(model: str) -> list[list[Cell]]:
    """Budgets and baselines; formats; other policies; parts; ways to launch; prompts; batches."""
    others = [p.name for p in POLICIES.values() if p.keeps and not p.all_resident and p.name != BASE]
    budgets = [Cell(model, BASE, share) for share in SHARES]
    baselines = [Cell(model, p.name, PAPER_SHARE) for p in POLICIES.values() if not p.keeps]
    formats = [Cell(model, BASE, share, format=f) for f in _other_formats(model) for share in SHARES]
    policies = [Cell(model, name, share) for name in others for share in (PAPER_SHARE, MIDDLE_SHARE)]
    parts = [Cell(model, part.base, MIDDLE_SHARE, without=part.name) for part in PARTS.values()]
    launches = shown(model)
    prompts = [cell for prompt in PROMPTS[1:] for cell in _varied(model, prompt=prompt)]
    batches = [cell for batch in BATCHES[1:] for cell in _varied(model, batch=batch)]
    first = [*budgets, Cell(model, "resident", ALL), *baselines]
    return [first, formats, policies, parts, launches, prompts, batches]


def _varied(model: str, prompt: int = PROMPTS[0], batch: int = 1) -> list[Cell]:
    """The ceiling, the baseline, and two that keep experts."""
    kept = [Cell(model, name, MIDDLE_SHARE, prompt, batch) for name in (BASE, BEST)]
    return [*kept, Cell(model, "on-demand", PAPER_SHARE, prompt, batch), Cell(model, "resident", ALL, prompt, batch)]


def _other_formats(model: str) -> tuple[str, ...]:
    return ("int4", "fp8") if model.startswith("Qwen3") else ("int4",) if model.startswith("Mixtral") else ()
