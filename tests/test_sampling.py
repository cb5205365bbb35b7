"""Sampling against transformers' processors, and its own promises: seeds, ties, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from duoserve.errors import DuoServeError, IntegrityError, RequestError
from duoserve.sampling import LIKELIEST, Sampler, SamplingParams, distinct, keep_top_p, penalize_repetition, truncate

V = 97


def theirs(params: SamplingParams, logits_V: torch.Tensor, context: list[int]) -> torch.Tensor:
    """The distribution that transformers' generate would draw from."""
    chain = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(params.repetition_penalty), TemperatureLogitsWarper(params.temperature)]
    )
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    chain.append(TopPLogitsWarper(params.top_p))
    chain.append(MinPLogitsWarper(params.min_p))
    return chain(torch.tensor([context]), logits_V[None].clone())[0].softmax(-1)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, V + 3),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
)


@settings(max_examples=150, deadline=None)
@given(params=PARAMS, seed=st.integers(0, 2**32))
def test_distribution_equals_transformers(params, seed):
    random = torch.Generator().manual_seed(seed)
    logits_V = 4 * torch.randn(V, generator=random)
    context = torch.randint(V, (20,), generator=random).tolist()
    ours = truncate(penalize_repetition(logits_V, distinct(context, V), params.repetition_penalty), params).softmax(-1)
    torch.testing.assert_close(ours, theirs(params, logits_V, context), rtol=1e-4, atol=1e-6)


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    sampler = Sampler(SamplingParams(seed=0, top_k=4), 5, [0])
    drawn = torch.bincount(torch.tensor([sampler(logits_V) for _ in range(4000)]), minlength=5) / 4000
    expected = torch.tensor([0.0, 1.0, 2.0, -math.inf, 0.5]).softmax(-1)
    assert drawn[3] == 0
    assert (drawn - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_a_seed_fixes_the_tokens_and_no_other_request_disturbs_them():
    logits_V = torch.randn(V, generator=torch.Generator().manual_seed(1))

    def draw(seed, noise=False):
        sampler, other = Sampler(SamplingParams(seed=seed), V, []), Sampler(SamplingParams(seed=99), V, [])
        tokens = []
        for _ in range(30):
            tokens.append(sampler(logits_V))
            if noise:
                other(logits_V)
                torch.rand(3)
        return tokens

    assert draw(7) == draw(7, noise=True)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits_V = torch.full((50_000,), -1.0)
    logits_V[[49_999, 31_234, 77]] = 3.0
    assert Sampler(SamplingParams(temperature=0.0), 50_000, [])(logits_V) == 77


@pytest.mark.parametrize("temperature", [1e-5, 1e-7, 5e-324])
def test_a_tiny_temperature_does_not_overflow(temperature):
    logits_V = torch.tensor([1e30, -1e30, 0.5e30])
    assert Sampler(SamplingParams(temperature=temperature), 3, [])(logits_V) == 0


def test_the_penalty_counts_a_token_once_and_ignores_ids_beyond_the_head():
    scores_V = penalize_repetition(torch.tensor([2.0, -2.0, 1.0]), distinct([0, 0, 1, 7], 3), 2.0)
    assert scores_V.tolist() == [1.0, -4.0, 1.0]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_a_sampler_penalizes_the_prompt_and_what_it_has_drawn(penalty):
    """As the whole context would have it, bit for bit: every token is compared."""
    params, context = SamplingParams(temperature=0.0, repetition_penalty=penalty), [3, 8, 3]
    sampler, random = Sampler(params, V, context.copy()), torch.Generator().manual_seed(2)
    for _ in range(2 * V):
        logits_V = torch.randn(V, generator=random)
        expected = int(penalize_repetition(logits_V, distinct(context, V), penalty).argmax())
        assert sampler(logits_V) == expected
        context.append(expected)


def test_top_p_keeps_the_lowest_ids_of_a_tie():
    kept = truncate(torch.zeros(5000), SamplingParams(top_p=0.25)).isfinite()
    assert torch.equal(kept, torch.arange(5000) < 1250)


def of_all_sorted(scores_V: torch.Tensor, p: float) -> torch.Tensor:
    """What top-p keeps, from the probabilities of the whole vocabulary in order."""
    order = scores_V.argsort(descending=True, stable=True)
    probs = scores_V[order].softmax(-1, dtype=torch.float64)
    out = probs.cumsum(-1) - probs >= p
    out[0] = False
    return scores_V.index_fill(0, order[out], -math.inf)


@settings(max_examples=200, deadline=None)
@given(
    size=st.sampled_from([1, LIKELIEST, LIKELIEST + 1, 5000]),
    levels=st.sampled_from([1, 3, 40, 100_000]),
    spread=st.floats(0.0, 40.0),
    ruled_out=st.sampled_from([0.0, 0.5, 0.999]),
    p=st.sampled_from([0.0, 1e-12, 0.1, 0.25, 0.5, 0.9, 0.99, 1 - 1e-12]) | st.floats(0.0, 1.0, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_top_p_keeps_what_it_would_with_all_tokens_sorted(size, levels, spread, ruled_out, p, seed):
    """With few levels many tokens tie, within the likeliest and across their edge."""
    random = torch.Generator().manual_seed(seed)
    scores_V = -spread * torch.randint(levels, (size,), generator=random) / levels
    scores_V[torch.rand(size, generator=random) < ruled_out] = -math.inf
    scores_V[torch.randint(size, (1,), generator=random)] = 0.0
    assert torch.equal(keep_top_p(scores_V, p), of_all_sorted(scores_V, p))


class Sorted(TorchDispatchMode):
    """Notes how many numbers each sort has."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("sort", "argsort"):
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("spread", "most"), [(4.0, LIKELIEST), (0.1, 50_000)])
def test_top_p_sorts_the_vocabulary_only_where_the_likeliest_tokens_are_not_enough(spread, most):
    scores_V = spread * torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    with Sorted() as sort:
        kept = keep_top_p(scores_V, 0.9)
    assert max(sort.sizes) == most
    assert torch.equal(kept, of_all_sorted(scores_V, 0.9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_the_models_fault(bad, temperature):
    logits_V = torch.zeros(V)
    logits_V[[3, 9]] = bad
    with pytest.raises(DuoServeError, match=r"non-finite logits \(2 of 97\) for token 5") as caught:
        Sampler(SamplingParams(temperature=temperature), V, [1, 2, 3, 4, 5])(logits_V)
    assert not isinstance(caught.value, RequestError)


def test_logits_of_another_vocabulary_are_a_bug():
    with pytest.raises(IntegrityError, match=r"\(96,\)"):
        Sampler(SamplingParams(), V, [])(torch.zeros(V - 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, but must be an integer of at least 1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0"),
        ({"temperature": -0.1}, "temperature is -0.1, but must be a number in 0..100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1, but must be an integer of at least 0"),
        ({"top_p": 1.01}, "top_p is 1.01, but must be a number in 0..1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, but must be a number in 0.01..100"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": ("a",) * 5}, "at most 4 non-empty strings"),
        ({"stop": ""}, "at most 4 non-empty strings"),
        ({"stop": ("a", 3)}, "at most 4 non-empty strings"),
        ({"stop": 3}, "stop is 3"),
    ],
)
def test_refusals_name_the_value_and_the_range(values, message):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert message in str(caught.value)


def test_a_lone_stop_string_becomes_a_tuple():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_integers_of_numpy_are_kept_as_those_of_python():
    params = SamplingParams(max_tokens=np.int64(5), top_k=np.int32(3), seed=np.uint64(2**64 - 1))
    assert params == SamplingParams(max_tokens=5, top_k=3, seed=2**64 - 1)
    assert {type(value) for value in (params.max_tokens, params.top_k, params.seed)} == {int}


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_every_allowed_seed_works(seed):
    assert 0 <= Sampler(SamplingParams(seed=seed), V, [])(torch.zeros(V)) < V
