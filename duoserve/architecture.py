"""What a decoder is made of, in numbers: one small config for each of its blocks, frozen and checked when made.

A family file (``models/``) maps a ``config.json`` to these, and the blocks of ``models/`` are built from them. Sizes
count elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from duoserve.errors import ConfigError

Scoring = Literal["softmax", "sigmoid", "softmax_of_topk"]
# Queries and keys are normed head by head, or as whole projections before they are split into heads.
NormOver = Literal["head", "projection"]
QuantMethod = Literal["awq", "fp8", "gptq", "mxfp4"]


class KVShape(NamedTuple):
    """What the KV cache keeps of one token in one layer: ``heads`` keys of ``key_dim`` and values of ``value_dim``."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (Peng et al., 2023): slow dimensions turn ``factor`` times slower, fast ones at their own speed.

    In between, dimensions of ``beta_slow`` to ``beta_fast`` turns over ``original_context`` positions are blended; with
    ``truncate`` the blend begins and ends at whole dimensions. Cosines and sines are multiplied by ``magnitude``, and
    the scores of latent attention by ``score_scale``.
    """

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    magnitude: float
    score_scale: float


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the first ``dim`` dimensions of a head, in pairs of neighbours if ``interleaved``."""

    dim: int
    theta: float
    interleaved: bool = False
    yarn: YarnConfig | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    ``windows`` has for each layer how many positions a token sees, itself included; None: all of them. ``clip`` bounds
    queries, keys and values. With ``sinks`` each head has one more logit, which takes its share of the softmax.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormOver | None = None
    clip: float | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly")

    @property
    def kv(self) -> KVShape:
        """What the KV cache keeps of a token."""
        return KVShape(self.num_kv_heads, self.head_dim, self.head_dim)

    @property
    def width(self) -> int:
        """Elements of all heads' queries together."""
        return self.num_heads * self.head_dim

    def __str__(self) -> str:
        return f"grouped-query: {self.num_heads} heads, {self.num_kv_heads} KV heads of {self.head_dim}"


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-AI, 2024a): keys and values of all heads come from one latent a token.

    A query or key has ``nope_dim`` plain and ``rope_dim`` rotated dimensions. ``query_rank`` None means that queries
    are projected in one step. With ``bias`` the projections into ranks and the output projection have biases.
    """

    num_heads: int
    query_rank: int | None
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    bias: bool = False

    @property
    def kv(self) -> KVShape:
        """The latent and the rotated key, in one row for all heads; values are read from the latent."""
        return KVShape(1, self.latent_dim + self.rope_dim, 0)

    @property
    def query_dim(self) -> int:
        """Dimensions of one head's query."""
        return self.nope_dim + self.rope_dim

    @property
    def width(self) -> int:
        """Elements of all heads' queries together."""
        return self.num_heads * self.query_dim

    def __str__(self) -> str:
        return f"latent: {self.num_heads} heads, {self.latent_dim} + {self.rope_dim} dimensions kept a token"


@dataclass(frozen=True)
class RouterConfig:
    """How ``top_k`` of ``num_experts`` are chosen and weighted; ``kernels.router_topk`` has the formulas.

    ``wide``: logits are computed in float32 whatever the model's dtype. ``rounded``: weights are rounded to the
    activations' dtype. ``bias``: one is added to the logits. ``correction``: one is added to the scores by which
    experts are chosen, but not to their weights.
    """

    num_experts: int
    top_k: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    wide: bool = False
    rounded: bool = False
    bias: bool = False
    correction: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}, but must lie in 1..{self.num_experts}, the number of experts")


@dataclass(frozen=True)
class SharedExpertConfig:
    """An expert that every token takes. If ``gated``, its output is weighted by a gate of its own."""

    intermediate_size: int
    gated: bool = False


@dataclass(frozen=True)
class ClampConfig:
    """gpt-oss's experts: ``(up + 1) * gate * sigmoid(alpha * gate)``, gate and up clamped at ``limit``, and biases."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class MoEConfig:
    """The feed-forward part: which ``layers`` have experts, in ascending order; the others have one dense network.

    ``dense_intermediate_size`` is the width of the dense networks, 0 if no layer has one.
    """

    router: RouterConfig
    expert_intermediate_size: int
    layers: tuple[int, ...]
    dense_intermediate_size: int = 0
    shared: SharedExpertConfig | None = None
    clamp: ClampConfig | None = None


@dataclass(frozen=True)
class Multipliers:
    """Granite's factors of the embeddings and of each block's output, and the divisor of its logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logits_divisor: float = 1.0


NO_MULTIPLIERS = Multipliers()


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint stores quantized matrices; ``experts/formats`` has a file for each method.

    ``group`` is how many input features share a scale, 0 for all of them; in fp8 and mxfp4 it is fixed and not used.
    The others are GPTQ's: ``symmetric``: all zero-points are 8; ``less_one``: each is stored as one less than it is;
    ``ordered``: features are grouped in another order than their own.
    """

    method: QuantMethod
    group: int = 0
    symmetric: bool = False
    less_one: bool = False
    ordered: bool = False

    def __str__(self) -> str:
        if self.method == "fp8":
            return "fp8, blocks of 128 x 128"
        if self.method == "mxfp4":
            return "mxfp4, groups of 32"
        groups = f"groups of {self.group}" if self.group else "a group for each output"
        return f"{self.method} int4, {groups}{', ordered by activation' if self.ordered else ''}"


@dataclass(frozen=True)
class Blocks:
    """What the families differ in. ``mtp_layers`` counts the layers behind the last, which guess further tokens."""

    attention: AttentionConfig | LatentAttentionConfig
    rope: RopeConfig
    moe: MoEConfig
    multipliers: Multipliers = NO_MULTIPLIERS
    mtp_layers: int = 0
