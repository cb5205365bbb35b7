"""Reads rotary embeddings from a ``config.json``, in the dialects of transformers 4 (the hub) and 5."""

from __future__ import annotations

from duoserve.architecture import RopeConfig, YarnConfig
from duoserve.models.config_fields import ConfigFields
from duoserve.models.rope import yarn_magnitude

ROPE_TYPES = ("default", "yarn")
MAX_POSITIONS = 1 << 30
LEAST_TURNS = 1e-6  # of YaRN, over the original context; with still fewer the quotient overflows


def rope_config(fields: ConfigFields, head_dim: int, *, partial: bool = False, interleaved: bool = False) -> RopeConfig:
    """Plain RoPE or YaRN over ``head_dim`` dimensions, or over a part of them if ``partial`` allows it.

    As in transformers 5, ``rope_scaling`` takes precedence over ``rope_parameters``, and fields inside of it over
    top-level fields. Raises ConfigError for any other kind.
    """
    inner = fields.inner("rope_scaling" if fields.is_set("rope_scaling") else "rope_parameters")
    dim = int(head_dim * _share(fields, inner, partial))
    if dim < 2 or dim % 2:
        raise fields.refusal("head_dim", f"a head has {dim} dimensions to turn, but RoPE needs an even number")
    theta = inner.number("rope_theta", 0, 1e12, fields.number("rope_theta", 0, 1e12))
    kind = inner.choice("rope_type" if inner.is_set("rope_type") else "type", ROPE_TYPES, "default")
    if kind == "yarn" and theta <= 1:
        raise (inner if inner.is_set("rope_theta") else fields).refusal("rope_theta", "with YaRN it must be above 1")
    return RopeConfig(dim, theta, interleaved, _yarn(fields, inner) if kind == "yarn" else None)


def _share(fields: ConfigFields, inner: ConfigFields, partial: bool) -> float:
    """The part of a head that is rotated."""
    outer = fields.number("partial_rotary_factor", 0, 1, 1.0)
    share = inner.number("partial_rotary_factor", 0, 1, outer)
    if share != 1 and not partial:
        raise (fields if outer != 1 else inner).refusal("partial_rotary_factor", "supported: 1.0")
    return share


def _yarn(fields: ConfigFields, inner: ConfigFields) -> YarnConfig:
    """YaRN: ``mscale`` scales cosines and sines; ``mscale_all_dim`` undoes it and scales latent attention's scores."""
    fields.absent("original_max_position_embeddings", "with YaRN, it belongs into rope_scaling or rope_parameters")
    factor = inner.number("factor", 0, 1e6)
    up, back = (_optional(inner, name) for name in ("mscale", "mscale_all_dim"))
    magnitude = yarn_magnitude(factor)
    if up and back:
        magnitude = yarn_magnitude(factor, up) / yarn_magnitude(factor, back)
    return YarnConfig(
        factor=factor,
        original_context=inner.integer(
            "original_max_position_embeddings",
            1,
            MAX_POSITIONS,
            fields.integer("max_position_embeddings", 1, MAX_POSITIONS),
        ),
        beta_fast=_optional(inner, "beta_fast", LEAST_TURNS) or 32.0,
        beta_slow=_optional(inner, "beta_slow", LEAST_TURNS) or 1.0,
        truncate=inner.flag("truncate", True),
        magnitude=magnitude if inner.is_null("attention_factor") else inner.number("attention_factor", 0, 1e6),
        score_scale=yarn_magnitude(factor, back) ** 2 if back else 1.0,
    )


def _optional(inner: ConfigFields, name: str, low: float = 0) -> float | None:
    return inner.number(name, low, 1e6) if inner.is_set(name) else None
