"""What a soak asks a server for: requests of random shape, some of which are given up, and some of which are wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from duoserve import SamplingParams

CANCELLED, MALFORMED = 0.05, 0.01  # of all requests
LONGEST_PROMPT, MOST_TOKENS = 400, 8  # characters, tokens
JSON = "application/json"
Fate = Literal["whole", "streamed", "cancelled", "malformed"]


@dataclass(frozen=True)
class Kind:
    """A prompt and what is wanted of it; its text is the same whenever it is asked for."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]
    n: int

    def params(self, repeat: int) -> SamplingParams:
        """Those of its choice ``repeat``; the server counts up from the seed too."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed + repeat, stop=self.stop
        )

    def body(self) -> dict[str, Any]:
        """A request for it."""
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stop": list(self.stop) or None,
            "n": self.n,
        }


class Asked(NamedTuple):
    """One request. One that is given up still gets ``patience`` pieces, or waits for so many tenths of a second."""

    fate: Fate
    kind: int
    extras: dict[str, Any]
    patience: int


class Wrong(NamedTuple):
    """A request that is the client's fault; ``says`` is the status that it must get."""

    method: str
    path: str
    body: bytes
    says: int
    content_type: str = JSON


def kinds(play: str, count: int, seed: int) -> list[Kind]:
    """Passages of ``play``: most of them greedy, some with a seed, a stop string or several choices."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        length = min(LONGEST_PROMPT, 1 + round(dice.expovariate(1 / 60)))
        start = dice.randrange(len(play) - length)
        found.append(
            Kind(
                play[start : start + length],
                dice.randint(1, MOST_TOKENS),
                0.0 if dice.random() < 0.85 else 0.8,
                dice.randrange(1 << 40),
                dice.choice(((), (), (), (" ",), ("th", "\n"))),
                dice.choice((1,) * 9 + (3,)),
            )
        )
    return found


def requests(count: int, num_kinds: int, seed: int) -> list[Asked]:
    """All requests in their order."""
    dice = random.Random(seed + 1)
    return [_request(dice, num_kinds) for _ in range(count)]


def _request(dice: random.Random, num_kinds: int) -> Asked:
    fate, chance = dice.choice(("whole", "streamed")), dice.random()
    if chance < MALFORMED:
        fate = "malformed"
    elif chance < MALFORMED + CANCELLED:
        fate = "cancelled"
    wanted = {"slo_ttft_ms": dice.choice((1, 500, 60_000)), "slo_tpot_ms": 100, "logprobs": dice.randrange(4)}
    extras = {name: value for name, value in wanted.items() if dice.random() < 0.2}
    return Asked(fate, dice.randrange(num_kinds), extras, dice.randrange(4))


def wrong(dice: random.Random) -> Wrong:
    """One of many ways to be wrong."""
    return dice.choice(WRONG)


def _wrong_field(field: str, value: object, says: int = 400) -> Wrong:
    return Wrong("POST", "/v1/completions", json.dumps({"prompt": "the king", field: value}).encode(), says)


def _chat(messages: object) -> Wrong:
    return Wrong("POST", "/v1/chat/completions", json.dumps({"messages": messages}).encode(), 400)


FIELDS: Sequence[tuple[str, object]] = (
    ("prompt", None),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", {"text": "a"}),
    ("prompt", [1, "a"]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [2**70]),
    ("prompt", ["a"] * 129),
    ("prompt", [5] * 100_000),
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("max_tokens", 10**9),
    ("max_tokens", 10**400),
    ("max_tokens", "many"),
    ("max_tokens", [4]),
    ("n", 1_000_000),
    ("n", 1.5),
    ("best_of", 3),
    ("logprobs", 21),
    ("logprobs", True),
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", 1e300),
    ("top_p", 1.01),
    ("top_k", -2),
    ("min_p", -0.1),
    ("repetition_penalty", 0),
    ("seed", 2**70),
    ("seed", "lucky"),
    ("stop", ["a"] * 5),
    ("stop", ""),
    ("stop", {"a": 1}),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("slo_ttft_ms", 0),
    ("slo_tpot_ms", "fast"),
    ("echo", True),
    ("suffix", "!"),
    ("logit_bias", {"5": 1}),
    ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {}),
)
WRONG: Sequence[Wrong] = (
    *(_wrong_field(*pair) for pair in FIELDS),
    _wrong_field("model", "gpt-9", 404),
    *(_chat(messages) for messages in (None, [], "hi", [{}], [{"role": "king", "content": "a"}], [{"role": "user"}])),
    *(
        Wrong("POST", "/v1/completions", body, 400)
        for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b'{"prompt": "\x00"}')
    ),
    Wrong("POST", "/v1/completions", b'{"prompt": "' + b"a" * (5 << 20) + b'"}', 413),
    Wrong("POST", "/v1/completions", b'{"prompt": "a"}', 415, "text/plain"),
    Wrong("POST", "/tokenize", b'{"prompt": 5}', 400),
    Wrong("GET", "/v1/completions", b"", 405),
    Wrong("POST", "/health", b"", 405),
    Wrong("POST", "/v1/embeddings", b"{}", 404),
    Wrong("GET", "/../etc/passwd", b"", 404),
)
