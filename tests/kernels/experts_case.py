"""A layer of random experts in a poisoned pool, some of them missing, with routed tokens and float64 truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from duoserve.experts.layout import ExpertLayout
from duoserve.kernels import RoutePlan, Work, reference
from tests.kernels.common import DEVICE, PoisonedPool, poisoned

SPARE_SLOTS = 2  # canaries


@dataclass
class Case:
    """``slots_E`` says where every expert is; ``plan`` was made when those in ``away`` were not there yet."""

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
        return Work.of(pairs, DEVICE)

    @property
    def computed(self) -> Tensor:
        """The sorted rows that belong to an expert: int64 flat positions, in sorted order."""
        return self.plan.order_N[: self.plan.starts[-1]].long()

    def act(self) -> Tensor:
        """A poisoned [R, I]."""
        return poisoned(len(self.plan.order_N), self.w2_EHI.shape[2], dtype=self.x_TH.dtype)

    def y(self) -> Tensor:
        """A poisoned [R, H]."""
        return poisoned(len(self.plan.order_N), self.w2_EHI.shape[1], dtype=self.x_TH.dtype)

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


def make_case(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    hot: bool = False,
    padding: bool = False,
    away: float = 0.5,
) -> Case:
    """``hot``: every token wants expert 0. ``padding``: some rows want no expert. ``away``: share not there yet."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    pool = PoisonedPool(experts + SPARE_SLOTS, ExpertLayout(dtype, hidden, inter))
    slots = torch.randperm(experts + SPARE_SLOTS, generator=generator)[:experts].int()
    w13, w2 = random(experts, 2 * inter, hidden) * hidden**-0.5, random(experts, hidden, inter) * inter**-0.5
    for expert, slot in enumerate(slots.tolist()):
        pool.put(slot, w13[expert], w2[expert])
    scores = torch.rand(tokens, experts, generator=generator)
    if hot:
        scores[:, 0] = 2.0
    ids = scores.argsort(dim=1, descending=True)[:, :top_k].contiguous()
    if padding:
        ids[torch.rand(tokens, generator=generator) < 0.4] = -1
    known = slots.where(torch.rand(experts, generator=generator) >= away, -1)
    plan = reference.route_plan(ids.to(DEVICE), known.to(DEVICE))
    return Case(pool, w13, w2, random(tokens, hidden), ids.to(DEVICE), slots.to(DEVICE), plan)


@st.composite
def cases(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype]) -> Case:
    """Small layers of every awkward shape."""
    experts = draw(st.integers(1, 6))
    return make_case(
        draw(st.sampled_from([1, 2, 7, 16, 17, 40])),
        draw(st.integers(1, min(3, experts))),
        experts,
        draw(st.sampled_from([16, 40, 64, 96])),
        draw(st.sampled_from([1, 8, 11, 32, 96])),
        draw(dtypes),
        seed=draw(st.integers(0, 999)),
        hot=draw(st.booleans()),
        padding=draw(st.booleans()),
        away=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
