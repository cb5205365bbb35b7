"""A layer of random experts of any format in a poisoned pool, some of them missing, with tokens and float64 truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from duoserve.experts.layout import ExpertLayout
from duoserve.kernels import HostWork, RoutePlan, Work, moe_gemm, reference
from duoserve.kernels.configs import GemmConfig, gemm_config
from duoserve.kernels.reference_dequant import dense
from duoserve.kernels.weights import ExpertFormat, QuantizedLayout
from tests.kernels.common import DEVICE, PoisonedPool, poisoned
from tests.kernels.quantized_case import LAYOUTS, fill_with_random_codes

SPARE_SLOTS = 2  # canaries
FLOAT = (ExpertFormat.FLOAT, 0)
FORMATS = (FLOAT, *LAYOUTS)  # each with the size of its groups
# How tokens choose: evenly; all of them expert 0; only the first experts, so that others are empty; all tokens alike;
# the same expert twice.
SKEWS = ("even", "hot", "few", "repeated", "twice")
TINY = GemmConfig(32, 16, 32, 4, 2, 1, "many tiles of small matrices", group_t=2)


@dataclass
class Case:
    """``slots_E`` says where every expert is; ``plan`` was made when those in ``away`` were not there yet.

    ``w13_ENH`` and ``w2_EHI`` are the weights, decoded exactly: FLOAT as they are, BF12 in bfloat16, others in float32.
    """

    pool: PoisonedPool
    w13_ENH: Tensor
    w2_EHI: Tensor
    x_TH: Tensor
    ids_TK: Tensor
    slots_E: Tensor
    plan: RoutePlan

    @property
    def all_work(self) -> Work:
        """Every expert that has rows, in one list."""
        return reference.route_plan(self.ids_TK, self.slots_E).resident

    @property
    def arrived(self) -> Work:
        """The missing experts, now that they are in their slots."""
        pairs = [(expert, int(self.slots_E[expert])) for expert, _ in self.plan.missing.pairs()]
        return HostWork.of(pairs, DEVICE)

    @property
    def computed(self) -> Tensor:
        """The sorted rows that belong to an expert: int64 flat positions, in sorted order."""
        return self.plan.order_R[: self.plan.starts[-1]].long()

    def act(self) -> Tensor:
        """A poisoned [R, I]."""
        return poisoned(len(self.plan.order_R), self.w2_EHI.shape[2], dtype=self.x_TH.dtype)

    def y(self) -> Tensor:
        """A poisoned [R, H]."""
        return poisoned(len(self.plan.order_R), self.w2_EHI.shape[1], dtype=self.x_TH.dtype)

    def true_act(self) -> Tensor:
        """float64 [R', I] of the computed rows, in sorted order."""
        experts = self.ids_TK.flatten()[self.computed].long()
        x = self.x_TH.double()[self.computed // self.plan.top_k]
        up = torch.einsum("rnh,rh->rn", self.w13_ENH.double()[experts], x)
        return torch.nn.functional.silu(up[:, 0::2]) * up[:, 1::2]

    def true_y(self, act_RI: Tensor) -> Tensor:
        """float64 [R', H] of the computed rows' ``act``, in sorted order."""
        experts = self.ids_TK.flatten()[self.computed].long()
        return torch.einsum("rhi,ri->rh", self.w2_EHI.double()[experts], act_RI[: len(experts)].double())

    def moved(self) -> Case:
        """The same experts in other slots, with nothing where they were."""
        pool, slots_E = PoisonedPool(len(self.pool.rows_SB), self.pool.layout), self.slots_E.roll(1)
        pool.rows_SB[slots_E.long()] = self.pool.rows_SB[self.slots_E.long()]
        pool.keep()
        return replace(self, pool=pool, slots_E=slots_E)

    def alone(self, token: int) -> Case:
        """One token of the batch."""
        x_TH, ids_TK = self.x_TH[token : token + 1], self.ids_TK[token : token + 1]
        return replace(self, x_TH=x_TH, ids_TK=ids_TK, plan=reference.route_plan(ids_TK, self.slots_E))

    def tiny(self, tma: bool = False) -> GemmConfig:
        """Tiles so small that small matrices have many; BF12 is read through pointers in any case."""
        weights = self.pool.weights
        tma = tma and weights.format is not ExpertFormat.BF12
        row = gemm_config(self.x_TH.dtype, 0, 16, tma, weights.format, weights.group)
        grouped = weights.format not in (ExpertFormat.FLOAT, ExpertFormat.INT8, ExpertFormat.BF12)
        return replace(TINY, tma=tma, block_k=row.block_k if grouped else TINY.block_k)


def layer(
    case: Case, config: GemmConfig | None = None, launches: list[list[tuple[int, int]]] | None = None
) -> tuple[Tensor, Tensor]:
    """(act, y) of the GEMMs, by one launch of all experts or by a launch for each list of (expert, slot) pairs."""
    act, y = case.act(), case.y()
    works = [case.all_work] if launches is None else [HostWork.of(pairs, DEVICE) for pairs in launches]
    for work in works:
        moe_gemm.moe_up(case.x_TH, case.pool.weights, case.plan, work, act, config=config)
    for work in works:
        moe_gemm.moe_down(act, case.pool.weights, case.plan, work, y, config)
    return act, y


def make_case(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype,
    form: tuple[ExpertFormat, int] = FLOAT,
    *,
    seed: int = 0,
    skew: str = "even",
    padding: bool = False,
    away: float = 0.5,
) -> Case:
    """``skew`` of SKEWS. ``padding``: some tokens want no expert and are NaN. ``away``: share of experts not there."""
    generator = torch.Generator().manual_seed(seed)
    layout = ExpertLayout(dtype, hidden, inter) if form == FLOAT else QuantizedLayout(form[0], hidden, inter, form[1])
    pool = PoisonedPool(experts + SPARE_SLOTS, layout)
    slots = torch.randperm(experts + SPARE_SLOTS, generator=generator)[:experts].int()
    for matrix in (pool.weights.w13, pool.weights.w2):
        for slot in slots.tolist():
            if form == FLOAT:
                weights = torch.randn(matrix.data_SNB.shape[1:], generator=generator) * matrix.inner**-0.5
                matrix.data_SNB[slot] = weights.to(dtype).to(DEVICE)
            else:
                fill_with_random_codes(matrix, slot, generator)
    pool.keep()
    w13, w2 = (
        torch.stack([dense(matrix, slot) for slot in slots.tolist()]) for matrix in (pool.weights.w13, pool.weights.w2)
    )
    x, ids = _tokens(tokens, top_k, experts, hidden, skew, generator)
    if padding:
        unrouted = torch.rand(tokens, generator=generator) < 0.4
        ids[unrouted], x[unrouted] = -1, float("nan")
    known = slots.where(torch.rand(experts, generator=generator) >= away, -1)
    plan = reference.route_plan(ids.to(DEVICE), known.to(DEVICE))
    return Case(pool, w13, w2, x.to(dtype).to(DEVICE), ids.to(DEVICE), slots.to(DEVICE), plan)


def _tokens(
    tokens: int, top_k: int, experts: int, hidden: int, skew: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the tokens are, [T, H], and the ids [T, K] that they choose."""
    x, scores = torch.randn(tokens, hidden, generator=generator), torch.rand(tokens, experts, generator=generator)
    if skew == "hot":
        scores[:, 0] = 2.0
    elif skew == "few":
        scores[:, :top_k] += 1.0
    elif skew == "repeated":
        x, scores = x[:1].repeat(tokens, 1), scores[:1].repeat(tokens, 1)
    ids = scores.argsort(dim=1, descending=True)[:, :top_k].contiguous()
    if skew == "twice":
        ids[:, -1] = ids[:, 0]
    return x, ids


def sizes_of(form: tuple[ExpertFormat, int]) -> tuple[list[int], list[int]]:
    """The awkward H and I that experts of this format may have."""
    format, group = form
    if format is ExpertFormat.INT4:
        return ([128, 256], [128]) if group == 128 else ([group, 2 * group], [group, 2 * group])
    if format is ExpertFormat.MXFP4:
        return [32, 64, 96], [32, 64, 96]
    if format is ExpertFormat.FP8:  # blocks of 128: parts of one, and more than one
        return [40, 96, 144], [1, 11, 32, 144]
    if format is ExpertFormat.BF12:
        return [16, 40, 64, 96], [4, 8, 12, 32, 96]
    return [16, 40, 64, 96], [1, 8, 11, 32, 96]


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: st.SearchStrategy[torch.dtype],
    form: tuple[ExpertFormat, int] = FLOAT,
    tokens: tuple[int, ...] = (1, 2, 7, 16, 17, 40),
) -> Case:
    """Small layers of every awkward shape."""
    experts = draw(st.integers(1, 6))
    hidden, inter = (draw(st.sampled_from(sizes)) for sizes in sizes_of(form))
    case = make_case(
        draw(st.sampled_from(tokens)),
        draw(st.integers(1, min(3, experts))),
        experts,
        hidden,
        inter,
        draw(dtypes),
        form,
        seed=draw(st.integers(0, 999)),
        skew=draw(st.sampled_from(SKEWS)),
        padding=draw(st.booleans()),
        away=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    assume(well_conditioned(case.true_act()))
    return case


def well_conditioned(truth: Tensor) -> bool:
    """Not all sums, of which there may be but one, have cancelled: such have no relative accuracy in float32."""
    return truth.numel() == 0 or float(truth.square().mean().sqrt()) > 0.2
