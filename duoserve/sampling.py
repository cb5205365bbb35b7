"""From the logits of one position to the next token: what a request may ask for, and the draw itself.

V vocabulary, N tokens that were seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from duoserve.errors import DuoServeError, IntegrityError, RequestError
from duoserve.interface import TokenLogprobs
from duoserve.number_checks import check_number, checked_integer

MAX_STOPS = 4
GREEDY_BELOW = 1e-6  # float32 logits of ordinary size differ by more than this, so the limit has been reached
LOWEST_SEED, HIGHEST_SEED = -(2**63), 2**64 - 1  # that torch.Generator takes
# The lowest and the highest value of each field that may be a fraction.
RANGES = {"temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (0.01, 100.0)}
# Tokens that top-p looks at before it sorts the vocabulary (bench/LOG.md has what that is worth).
LIKELIEST = 1024
ROUNDING = 1e-9  # no sum of probabilities in float64 is as far as that from another of the same


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Every value is checked here; a refusal is a ``RequestError``.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 are off.
    ``stop`` is one string or several and is kept as a tuple. It is looked for in the text, where special tokens are
    not: "</s>", where that is one, is never found. Without a ``seed`` each request draws anew.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _checked_stops(self.stop))
        object.__setattr__(self, "max_tokens", checked_integer(RequestError, "max_tokens", self.max_tokens, 1))
        object.__setattr__(self, "top_k", checked_integer(RequestError, "top_k", self.top_k, 0))
        if self.seed is not None:
            seed = checked_integer(RequestError, "seed", self.seed, LOWEST_SEED, HIGHEST_SEED)
            object.__setattr__(self, "seed", seed)
        for name, (low, high) in RANGES.items():
            check_number(RequestError, name, getattr(self, name), low, high)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}, but must be True or False")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW


def _checked_stops(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (tuple, list)) else (None,)
    if len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop is {stop!r}, but must be at most {MAX_STOPS} non-empty strings")
    return stops


class Sampler:
    """Draws the tokens that follow one prompt. Its random numbers are its own: requests cannot disturb each other."""

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self._prompt_ids = prompt_ids
        self._num_tokens = len(prompt_ids)  # and those drawn
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The token that follows the prompt and those drawn so far, from its float32 logits on any device.

        Raises ``DuoServeError`` when a logit is NaN or infinite: that is the model's fault, not the request's.
        """
        if logits_V.shape != (self.vocab_size,):
            raise IntegrityError(f"logits have shape {tuple(logits_V.shape)}, the vocabulary {self.vocab_size} entries")
        scores_V = logits_V.detach().float().cpu()
        _check_finite(scores_V, position=self._num_tokens)
        if self._penalizes:
            scores_V = penalize_repetition(scores_V, self._seen_N, self.params.repetition_penalty)
        token = self._draw(scores_V)
        self._num_tokens += 1
        if self._penalizes and token not in self._seen_N:
            self._seen_N = torch.cat([self._seen_N, self._seen_N.new_tensor([token])])
        return token

    @property
    def _penalizes(self) -> bool:
        return self.params.repetition_penalty != 1.0

    @cached_property
    def _seen_N(self) -> Tensor:
        """What is penalized. It is made when the first token is drawn: the samplers of those who wait may be many."""
        return distinct(self._prompt_ids, self.vocab_size)

    def _draw(self, scores_V: Tensor) -> int:
        if self.params.greedy:
            return int(scores_V.argmax())  # the lowest id of those that tie
        probs_V = truncate(scores_V, self.params).softmax(-1)
        return int(torch.multinomial(probs_V, 1, generator=self._random))


def token_logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """The natural log of the probability of ``token`` by the logits as they are, and the ``count`` likeliest tokens."""
    logprobs_V = logits_V.detach().float().cpu().log_softmax(-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs_V[token]), top)


def _check_finite(scores_V: Tensor, position: int) -> None:
    lowest, highest = torch.aminmax(scores_V)  # a NaN is both
    if not math.isfinite(float(lowest)) or not math.isfinite(float(highest)):
        bad = len(scores_V) - int(scores_V.isfinite().sum())
        raise DuoServeError(
            f"the model produced non-finite logits ({bad} of {len(scores_V)}) for token {position} of the sequence: "
            "a weight or an activation is NaN or too large for its dtype"
        )


def distinct(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """Each of ``token_ids`` once, int64 [N]; ids beyond the vocabulary are left out."""
    return torch.tensor(sorted({token for token in token_ids if token < vocab_size}), dtype=torch.int64, device="cpu")


def penalize_repetition(scores_V: Tensor, seen_N: Tensor, penalty: float) -> Tensor:
    """Divides the positive and multiplies the negative scores of the tokens in ``seen_N``, where each is once."""
    old_N = scores_V[seen_N]
    return scores_V.index_copy(0, seen_N, torch.where(old_N < 0, old_N * penalty, old_N / penalty))


def truncate(scores_V: Tensor, params: SamplingParams) -> Tensor:
    """Scores at ``params.temperature``, with -inf where top-k, then top-p, then min-p rule a token out.

    The most likely token always stays. The maximum is 0, so no temperature can overflow.
    """
    scores_V = (scores_V - scores_V.max()) / params.temperature
    if params.top_k:
        scores_V = keep_top_k(scores_V, params.top_k)
    if params.top_p < 1.0:
        scores_V = keep_top_p(scores_V, params.top_p)
    if params.min_p > 0.0:
        scores_V = keep_min_p(scores_V, params.min_p)
    return scores_V


def keep_top_k(scores_V: Tensor, k: int) -> Tensor:
    """The k highest scores, and all that tie with the last of them."""
    kth = scores_V.topk(min(k, len(scores_V))).values[-1]
    return scores_V.masked_fill(scores_V < kth, -math.inf)


def keep_top_p(scores_V: Tensor, p: float) -> Tensor:
    """The fewest most likely tokens whose probabilities reach ``p``; of those that tie, the lowest ids."""
    if len(scores_V) > LIKELIEST and (kept := _reaching(scores_V, p)) is not None:
        return torch.full_like(scores_V, -math.inf).index_copy_(0, kept, scores_V[kept])
    order = scores_V.argsort(descending=True, stable=True)
    probs = scores_V[order].softmax(-1, dtype=torch.float64)
    before = probs.cumsum(-1) - probs
    out = before >= p
    out[0] = False
    return scores_V.index_fill(0, order[out], -math.inf)


def _reaching(scores_V: Tensor, p: float) -> Tensor | None:
    """The ids that ``keep_top_p`` keeps, from the LIKELIEST tokens alone; None where only all tokens decide.

    They do where a sum is so near to ``p`` that the order of summation counts, and where the last token that is kept
    ties with the last of the likeliest: others, of lower ids, may tie with it.
    """
    ids = scores_V.topk(LIKELIEST, sorted=False).indices.sort().values
    likeliest, order = scores_V[ids].sort(descending=True, stable=True)
    probs = (likeliest.double() - scores_V.double().logsumexp(0)).exp()
    before = (probs.cumsum(-1) - probs)[1:]
    count = 1 + int((before < p).sum())
    surely = likeliest[count - 1] > likeliest[-1] and ((before - p).abs() > ROUNDING).all()
    return ids[order[:count]] if surely else None


def keep_min_p(scores_V: Tensor, min_p: float) -> Tensor:
    """The tokens at least ``min_p`` times as likely as the most likely one."""
    return scores_V.masked_fill(scores_V < scores_V.max() + math.log(min_p), -math.inf)
