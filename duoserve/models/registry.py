"""From the architecture that a ``config.json`` names to the family that implements it."""

from __future__ import annotations

from typing import Any

from duoserve.models import deepseek, glm4_moe, gpt_oss, granite_moe, mixtral, olmoe, qwen2_moe, qwen3_moe
from duoserve.models.config_fields import ConfigFields
from duoserve.models.family import Family

FAMILIES = (
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    qwen2_moe.FAMILY,
    olmoe.FAMILY,
    deepseek.FAMILY_V2,
    deepseek.FAMILY_V3,
    glm4_moe.FAMILY,
    granite_moe.FAMILY,
    gpt_oss.FAMILY,
)


def family_of(raw: dict[str, Any]) -> Family:
    """The family of a raw ``config.json``.

    Raises ConfigError, which lists the known families, if model_type or architecture is unknown.
    """
    for family in FAMILIES:
        if raw.get("model_type") == family.model_type:
            _check_architectures(raw, family)
            _check_auto_map(raw, family)
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigFields(raw).refusal("model_type", f"supported: {supported}")


def _check_architectures(raw: dict[str, Any], family: Family) -> None:
    """Checks ``architectures``: if it is there, it must name the class that predicts the next token."""
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and family.architecture in named):
        raise ConfigFields(raw).refusal("architectures", f"supported: {family.architecture}")


def _check_auto_map(raw: dict[str, Any], family: Family) -> None:
    """Checks ``auto_map``, which names classes in code that comes with a checkpoint. That code is never run.

    DeepSeek's code is that of classes which transformers now has itself. Other code may compute something else than
    duoserve, so it is refused.
    """
    auto_map = raw.get("auto_map") or {}
    stem = family.architecture.removesuffix("ForCausalLM")
    same = {f"{stem}{kind}" for kind in ("Config", "Model", "ForCausalLM")}
    classes = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    if not all(str(name).rpartition(".")[2] in same for name in classes):
        why = "code that comes with a checkpoint is never run; remove the field to use duoserve's own"
        raise ConfigFields(raw).refusal("auto_map", why)
