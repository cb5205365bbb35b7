"""Variants of a loaded model, which share its tensors and compute in another way. The model itself stays as it is."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from duoserve.kernels import Products
from duoserve.kernels.small_ops import SmallOps
from duoserve.models.moe import RoutingScript
from duoserve.models.tap import RoutingTap
from duoserve.models.transformer import Transformer


def with_products(model: Transformer, products: Products) -> Transformer:
    """A variant whose matrix products on a CPU share rows as ``products`` says."""
    return _with(model, "products", products)


def with_ops(model: Transformer, ops: SmallOps) -> Transformer:
    """A variant that calls ``ops`` for the small ops between its matrix products."""
    return _with(model, "ops", ops)


def with_script(model: Transformer, script: RoutingScript) -> Transformer:
    """A variant in which ``script`` makes the routers' choices."""
    return _with(model, "script", script)


def with_tap(model: Transformer, tap: RoutingTap) -> Transformer:
    """A variant whose routers tell ``tap`` what they choose."""
    return _with(model, "tap", tap)


def _with(model: Transformer, name: str, value: object) -> Transformer:
    changed: Transformer = _changed(model, name, value)
    return changed


def _changed(part: Any, name: str, value: object) -> Any:
    """A copy of ``part`` with ``value`` in every field called ``name``, at any depth; ``part`` itself if there is none.

    Only tuples and frozen dataclasses are searched. Other objects have state of their own, and both models share them.
    """
    if type(part) is tuple:
        return tuple(_changed(each, name, value) for each in part)
    if not is_dataclass(part) or isinstance(part, type) or not part.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return part
    old = {field.name: getattr(part, field.name) for field in fields(part)}
    new = {field: value if field == name else _changed(each, name, value) for field, each in old.items()}
    return part if all(new[field] is old[field] for field in old) else replace(part, **new)
