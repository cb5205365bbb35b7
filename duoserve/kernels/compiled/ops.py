"""The small ops of prompts as loops that PyTorch's compiler makes for a CPU, once for all numbers of rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from duoserve import kernels
from duoserve.errors import CompilerError
from duoserve.kernels.compiled.compiler import loading_compiler
from duoserve.kernels.compiled.tape import Compiled
from duoserve.kernels.small_ops import SmallOps

_Result = TypeVar("_Result")


def compiled_ops() -> SmallOps:
    """The ops of one model, as loops. Negative rows of ``rope_write_kv`` must come last."""
    return SmallOps(
        rms_norm=ForRows(kernels.rms_norm, fixed=(1,)),
        add_rms_norm=ForRows(kernels.add_rms_norm, fixed=(2,)),
        rope_write_kv=ForRows(kernels.rope_write_kv, fixed=(5, 6)),
        moe_combine=ForRows(kernels.moe_combine),
    )


class ForRows(Generic[_Result]):
    """An op of ``kernels``, compiled when it first meets tensors of these dtypes, widths and strides.

    Rows are the first dimension of its tensors, except of those at the places ``fixed``; one row goes to the op itself.
    No row changes the bits of another. Bits differ slightly from those of ``kernels``, which rounds in between.
    """

    def __init__(self, op: Callable[..., _Result], fixed: Collection[int] = ()) -> None:
        self._op = op
        self._fixed = fixed
        self._made: dict[object, Compiled] = {}

    def __call__(self, *operands: Any) -> _Result:
        """The op's result. The first of its operands has rows."""
        if len(operands[0]) == 1:
            return self._op(*operands)
        key = tuple(self._kind(place, operand) for place, operand in enumerate(operands))
        if key not in self._made:
            self._made[key] = self._compiled(operands)
        return cast(_Result, self._made[key](*filter(_is_tensor, operands)))

    def _kind(self, place: int, operand: object) -> object:
        """The properties of an operand that code is made for; the value of an operand that is not a tensor."""
        if not isinstance(operand, Tensor):
            return operand
        return operand.dtype, operand.shape if place in self._fixed else operand.shape[1:], operand.stride()

    def _compiled(self, operands: Sequence[Any]) -> Compiled:
        places = [place for place, operand in enumerate(operands) if isinstance(operand, Tensor)]

        def work(*tensors: Tensor) -> _Result:
            given = dict(zip(places, tensors, strict=True))
            return self._op(*[given.get(place, operand) for place, operand in enumerate(operands)])

        fixed = [place in self._fixed for place in places]
        try:
            with loading_compiler():
                from duoserve.kernels.compiled import inductor  # noqa: PLC0415 - takes a second
            return inductor.compile_for_rows(work, [operands[place] for place in places], fixed)
        except CompilerError as error:
            warnings.warn(f"an op of prompts could not be compiled ({error}): it runs as it is", stacklevel=2)
            return work


def _is_tensor(operand: object) -> bool:
    return isinstance(operand, Tensor)
