"""How many bytes of tensors are alive: what an allocator's statistics say on a GPU, counted on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that ops make inside, from their making until nobody holds them: ``live`` and ``peak``.

    Ops that are made of others are taken apart, as attention is where it writes its scores out. What the others
    allocate and free within themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        parts = self._in_parts(func, args, kwargs or {})
        if parts is not NotImplemented:
            return parts
        fresh = func is torch.ops.aten.lift_fresh.default  # torch.tensor() shows itself by this alone
        given = set() if fresh else {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id_of(leaf) not in given:
                self._made(leaf.untyped_storage())
        return result

    def _in_parts(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The result by the ops that ``func`` is made of, which come one by one; NotImplemented if it is one itself."""
        with self:
            return func.decompose(*args, **kwargs)

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def id_of(tensor: Tensor) -> int:
    """The same for all views of one storage."""
    return tensor.untyped_storage()._cdata
