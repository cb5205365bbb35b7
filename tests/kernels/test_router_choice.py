"""The router: Triton and twin against float64 formulas written out for each family, and the rule for ties."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from duoserve.errors import KernelError
from duoserve.kernels import reference_small as reference
from duoserve.kernels.router_choice import router_topk
from tests.kernels.common import DEVICE, DTYPES, assert_close, assert_same_bits


@dataclass(frozen=True)
class Family:
    """The op's options for one family, and the name of its formula below."""

    formula: str
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "mixtral": Family("softmax_renormalized"),
    "qwen": Family("softmax", {"renormalize": False}),
    "qwen_norm_topk_prob": Family("softmax_renormalized", {"renormalize": True}),
    "granite_gpt_oss": Family("softmax_of_topk", {"scoring": "softmax_of_topk"}),
    "deepseek_v2": Family("deepseek_v2", {"n_group": 4, "topk_group": 2, "renormalize": False, "scale": 16.0}),
    "deepseek_v3": Family("deepseek_v3", {"scoring": "sigmoid", "n_group": 4, "topk_group": 2, "scale": 2.5}),
    "glm": Family("deepseek_v3", {"scoring": "sigmoid", "n_group": 1, "topk_group": 1, "scale": 1.0}),
}


def best(scores: list[float], count: int) -> list[int]:
    """The places of the highest scores, the lowest place first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def softmax(logits: list[float]) -> list[float]:
    exps = [math.exp(x - max(logits)) for x in logits]
    return [e / sum(exps) for e in exps]


def formula(family: Family, logits: list[float], top_k: int, bias: list[float]) -> tuple[list[float], list[int]]:
    """One token's weights and ids in double precision, as CHECKPOINTS.md section 3 gives them."""
    groups, kept, scale = (family.options.get(name, 1) for name in ("n_group", "topk_group", "scale"))
    size = len(logits) // groups
    if family.formula == "softmax_of_topk":
        ids = best(logits, top_k)
        return softmax([logits[e] for e in ids]), ids
    if family.formula == "deepseek_v3":
        weights = [1 / (1 + math.exp(-x)) for x in logits]
        choice = [w + b for w, b in zip(weights, bias, strict=True)]
        group_scores = [sum(sorted(choice[n * size : (n + 1) * size])[-2:]) for n in range(groups)]
    else:
        weights = choice = softmax(logits)
        group_scores = [max(choice[n * size : (n + 1) * size]) for n in range(groups)]
    chosen_groups = best(group_scores, kept)
    ids = best([c if e // size in chosen_groups else -math.inf for e, c in enumerate(choice)], top_k)
    if "deepseek_v3" in family.formula or "renormalized" in family.formula:
        scale /= sum(weights[e] for e in ids)
    return [weights[e] * scale for e in ids], ids


@given(
    name=st.sampled_from(list(FAMILIES)),
    tokens=st.integers(0, 4),
    group_size=st.sampled_from([2, 5, 8, 20]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_every_familys_formula(
    name: str, tokens: int, group_size: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    family, experts = FAMILIES[name], 4 * group_size
    top_k = data.draw(st.integers(1, min(8, family.options.get("topk_group", 1) * group_size)))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    logits, bias = (3 * torch.randn(tokens, experts, device=DEVICE)).to(dtype), torch.randn(experts, device=DEVICE)
    bias_option = {"bias_E": bias} if "sigmoid" in family.options.values() else {}
    if bias_option:
        # Two scores nearer than their rounding may change places.
        choice = logits.double().sigmoid() + bias.double()
        assume(tokens == 0 or float(choice.sort().values.diff().min()) > 1e-6)
    weights, ids = router_topk(logits, top_k, **family.options, **bias_option)
    twin_weights, twin_ids = reference.router_topk(logits, top_k, **family.options, **bias_option)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert ids.tolist() == twin_ids.tolist()
    truth = [formula(family, row, top_k, bias.tolist()) for row in logits.double().tolist()]
    assert ids.tolist() == [row_ids for _, row_ids in truth]
    truth_weights = torch.tensor([row for row, _ in truth], dtype=torch.float64).view(tokens, top_k)
    assert_close(weights, truth_weights, torch.float32)
    assert_close(twin_weights, truth_weights, torch.float32)


@given(levels=st.integers(1, 3), data=st.data())
@settings(max_examples=20, deadline=None)
def test_of_equal_scores_the_lowest_id_wins(levels: int, data: st.DataObject) -> None:
    """Experts and groups; signed zeros are equal."""
    values = st.sampled_from([0.0, -0.0, 1.5, -2.0][: levels + 1])
    logits = torch.tensor([data.draw(st.lists(values, min_size=12, max_size=12))], device=DEVICE)
    for options in ({}, {"n_group": 3, "topk_group": 2}, {"scoring": "sigmoid", "n_group": 3, "topk_group": 2}):
        top_k = data.draw(st.integers(1, 8))
        ids = router_topk(logits, top_k, **options)[1]
        assert ids.tolist() == reference.router_topk(logits, top_k, **options)[1].tolist()
        if not options:
            assert ids[0].tolist() == best(logits[0].tolist(), top_k)


def test_the_twins_two_ways_to_choose_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randint(-9, 9, (200, 16)).float() * torch.randint(1, 99, (200, 1))
    logits[7, 3] = float("nan")
    by_sorting = reference.router_topk(logits, 4)[1]
    monkeypatch.setattr(reference, "SORT_ELEMENTS", 0)
    assert reference.router_topk(logits, 4)[1].tolist() == by_sorting.tolist()


def test_all_equal() -> None:
    logits = torch.zeros(2, 64, device=DEVICE)
    for route in (router_topk, reference.router_topk):
        weights, ids = route(logits, 4, n_group=8, topk_group=2)
        assert ids.tolist() == [[0, 1, 2, 3]] * 2
        assert weights.tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_of_topk"])
def test_ids_stay_in_range_whatever_the_logits(scoring: Any) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 8, [-inf] * 8, [inf] * 8, [nan, inf, -inf, 0, -0.0, 1, nan, 2], [-nan, 1, 2, 3, 4, 5, 6, -nan]]
    logits = torch.tensor(rows, device=DEVICE)
    for options in ({}, {"n_group": 2, "topk_group": 1}):
        ids = router_topk(logits, 4, scoring=scoring, **options)[1]
        assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 8 for row in ids.tolist())
    assert router_topk(logits, 4, scoring=scoring)[1][3].tolist() == [0, 6, 1, 7]
    assert reference.router_topk(logits, 4, scoring=scoring)[1][3].tolist() == [0, 6, 1, 7]


def test_weights_are_rounded_to_the_activations_dtype() -> None:
    logits = torch.randn(6, 16, device=DEVICE)
    exact = router_topk(logits, 4)[0]
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_bits(router_topk(logits, 4, round_to=dtype)[0], exact.to(dtype).float())


def test_a_token_has_the_same_bits_alone_and_in_a_batch() -> None:
    logits = torch.randn(9, 60, device=DEVICE).half()
    weights, ids = router_topk(logits, 6)
    for t in range(9):
        alone_weights, alone_ids = router_topk(logits[t : t + 1], 6)
        assert_same_bits(alone_weights[0], weights[t])
        assert_same_bits(alone_ids[0], ids[t])


def test_the_logits_may_be_part_of_a_wider_tensor() -> None:
    wide = torch.full((3, 40), float("nan"), device=DEVICE)
    wide[:, :12] = torch.randn(3, 12)
    assert_same_bits(router_topk(wide[:, :12], 3)[0], router_topk(wide[:, :12].contiguous(), 3)[0])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 13}, r"top_k is 13, but 12 experts can be chosen"),
    ({"top_k": 0}, r"top_k is 0"),
    ({"n_group": 5}, r"12 experts do not form 5 equal groups"),
    ({"n_group": 4, "topk_group": 5}, r"topk_group is 5 of 4 groups"),
    ({"n_group": 4, "topk_group": 1, "top_k": 4}, r"top_k is 4, but 3 experts can be chosen"),
    ({"n_group": 12, "topk_group": 4, "scoring": "sigmoid"}, r"a group has 1 experts"),
    ({"scoring": "tanh"}, r"scoring is 'tanh'"),
    ({"bias_E": torch.zeros(11)}, r"bias has shape \(11,\); it must be \[12\]"),
    ({"round_to": torch.int8}, r"round_to is torch.int8"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_not_defined_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        router_topk(torch.randn(2, 12), **{"top_k": 2, **options})
