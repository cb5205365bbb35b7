"""Models that compute otherwise than the one that was built, with its tensors."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from duoserve.kernels import Products
from duoserve.kernels.small_ops import SmallOps
from duoserve.models.transformer import Transformer


def with_products(model: Transformer, products: Products) -> Transformer:
    """The same model with all its products made so."""
    changed: Transformer = _changed(model, "products", products)
    return changed


def with_ops(model: Transformer, ops: SmallOps) -> Transformer:
    """The same model with these ops between its products."""
    changed: Transformer = _changed(model, "ops", ops)
    return changed


def _changed(part: Any, name: str, value: object) -> Any:
    """``part`` itself where nothing in it has such a field. What is not frozen has a state of its own: it is shared."""
    if type(part) is tuple:
        return tuple(_changed(each, name, value) for each in part)
    if not is_dataclass(part) or isinstance(part, type) or not part.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return part
    old = {field.name: getattr(part, field.name) for field in fields(part)}
    new = {field: value if field == name else _changed(each, name, value) for field, each in old.items()}
    return part if all(new[field] is old[field] for field in old) else replace(part, **new)
