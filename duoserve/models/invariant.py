"""A model in which no row of a pass changes the bits of another."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from duoserve.kernels import Products
from duoserve.models.transformer import Transformer


def with_products(model: Transformer, products: Products) -> Transformer:
    """The same model (all tensors shared) with all its products made so."""
    changed: Transformer = _changed(model, products)
    return changed


def _changed(part: Any, products: Products) -> Any:
    """``part`` itself where nothing in it multiplies. What is not frozen has a state of its own, and is shared."""
    if type(part) is tuple:
        return tuple(_changed(each, products) for each in part)
    if not is_dataclass(part) or isinstance(part, type) or not part.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return part
    old = {field.name: getattr(part, field.name) for field in fields(part)}
    new = {name: products if name == "products" else _changed(value, products) for name, value in old.items()}
    return part if all(new[name] is old[name] for name in old) else replace(part, **new)
