"""The tensors that a checkpoint must have for a model, in the checkpoint's format."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from math import prod

import torch

from duoserve.config import ModelConfig
from duoserve.errors import ConfigError
from duoserve.experts.checkpoint import FLOATS
from duoserve.experts.formats.codes import StoredTensor, WeightFormat
from duoserve.experts.formats.int4 import row_group
from duoserve.experts.formats.reading import format_of, stored_piece
from duoserve.experts.layout import ExpertId, ExpertLayout, Quantized, Stored
from duoserve.experts.safetensors_header import TensorInfo
from duoserve.kernels.weights import BF12_MOST, BF12_MULTIPLE, ExpertFormat
from duoserve.models.family import Family
from duoserve.scheduling.plan import ModelShape

# Whether a matrix outside of experts, by its name, is in the checkpoint's quantized format.
IsQuantized = Callable[[str, WeightFormat], bool]
PROJECTION = re.compile(r".*_proj(_with_mqa)?\.weight", re.DOTALL)


def weight_format(config: ModelConfig) -> WeightFormat | None:
    """The format of the model's quantized matrices; None if there are none."""
    return None if config.quantization is None else format_of(config.quantization)


def stored_experts(family: Family, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors that routed experts lie in, all of them in the checkpoint's format."""
    form = weight_format(config)
    if form is None:
        return {name: StoredTensor(shape, FLOATS) for name, shape in family.expert_shapes(config).items()}
    experts = ModelShape.of(config).all_experts()
    pieces = (piece for expert in experts for piece in family.expert_pieces(config, expert))
    return {name: tensor for piece in pieces for name, tensor in stored_piece(form, piece).items()}


def stored_tensors(family: Family, config: ModelConfig, is_quantized: IsQuantized) -> dict[str, StoredTensor]:
    """All tensors. Outside of experts, ``is_quantized(name, form)`` says which matrices are in the format."""
    form, dense = weight_format(config), dict[str, StoredTensor]()
    for name, need in family.dense_needs(config).items():
        if form is not None and len(need.shape) == 2 and is_quantized(name, form):
            dense |= {part.name: part.tensor for part in form.parts(name, *need.shape).values()}
        else:
            dense[name] = StoredTensor(need.shape, FLOATS)
    return dense | stored_experts(family, config)


def float_experts(family: Family, config: ModelConfig, names: Collection[str], is_quantized: IsQuantized) -> list[str]:
    """Those of ``names`` that are matrices of routed experts in floats, though the config calls experts quantized."""
    form = weight_format(config)
    if form is None:
        return []
    return [name for name in family.expert_shapes(config) if name in names and not is_quantized(name, form)]


def by_tensors(tensors: Mapping[str, TensorInfo]) -> IsQuantized:
    """Decides by tensors: a matrix is quantized if its tensor is not in floats, or if another tensor of it is there."""
    by_name = by_names(tensors)
    return lambda name, form: by_name(name, form) or (name in tensors and tensors[name].dtype not in FLOATS)


def by_names(names: Collection[str]) -> IsQuantized:
    """Decides by the names in an index: a matrix is quantized if another tensor of it is there."""
    return lambda name, form: any(part.name in names for part in form.parts(name, 1, 1).values() if part.name != name)


def by_convention(config: ModelConfig) -> IsQuantized:
    """Decides by the config alone, as most checkpoints do: all projections are quantized, in MXFP4 only experts."""
    mixed = config.quantization is not None and config.quantization.method == "mxfp4"
    return lambda name, form: not mixed and PROJECTION.fullmatch(name) is not None


def expert_layout(config: ModelConfig, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float16) -> ExpertLayout:
    """The row of one expert, in ``dtype`` unless it is quantized; int4 has its scales in ``scale_dtype``."""
    return ExpertLayout(_stored(config, dtype, scale_dtype), config.hidden_size, config.expert_intermediate_size)


def quantized_by_us(config: ModelConfig, kind: str) -> Quantized:
    """The format that ``quantize=kind`` gives experts; int4 has the largest groups up to 128 that divide their sizes.

    Raises ConfigError if the checkpoint is quantized already, if no groups divide the sizes, or if BF12 is impossible.
    """
    if config.quantization is not None:
        raise ConfigError(f"quantize={kind!r}: the checkpoint is quantized already ({config.quantization})")
    if kind == "int8":
        return Quantized(ExpertFormat.INT8)
    hidden, inter = config.hidden_size, config.expert_intermediate_size
    if kind == "bf12":
        return _bf12(config.dtype, hidden, inter)
    group = row_group(0, hidden, inter)
    if group is None:
        raise ConfigError(f"quantize={kind!r}: no groups of 32, 64 or 128 divide an expert of {hidden} x {inter}")
    return Quantized(ExpertFormat.INT4, group)


def _bf12(dtype: torch.dtype, hidden: int, inter: int) -> Quantized:
    if dtype is not torch.bfloat16:
        raise ConfigError(
            f"quantize='bf12' keeps the bits of bfloat16, and the checkpoint has {dtype}: use None or 'int8'"
        )
    if hidden % BF12_MULTIPLE or inter % BF12_MULTIPLE or max(hidden, inter) > BF12_MOST:
        raise ConfigError(
            f"quantize='bf12': sizes are multiples of {BF12_MULTIPLE} up to {BF12_MOST}, an expert's {hidden} x {inter}"
        )
    return Quantized(ExpertFormat.BF12)


def _stored(config: ModelConfig, dtype: torch.dtype, scale_dtype: torch.dtype) -> Stored:
    found = config.quantization
    if found is None:
        return dtype
    if found.method in ("fp8", "mxfp4"):
        return Quantized(ExpertFormat(found.method))
    group = row_group(found.group, config.hidden_size, config.expert_intermediate_size)
    if group is None:
        raise ConfigError(f"{found} cannot have groups that rows have")
    return Quantized(ExpertFormat.INT4, group, scale_dtype, found.ordered)


def scale_dtype_of(family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype of int4 scales: that of the first expert, which all others must have too."""
    form = weight_format(config)
    if form is None:
        return torch.float16
    piece = family.expert_pieces(config, ExpertId(config.moe_layers[0], 0))[0]
    return tensors[form.parts(piece.name, *piece.matrix_shape)["scales"].name].dtype


def stored_bytes(tensor: StoredTensor, dtype: torch.dtype) -> int:
    """Bytes of a tensor; a float tensor is counted in ``dtype``."""
    return prod(tensor.shape) * (dtype if tensor.dtypes is FLOATS else tensor.dtypes[0]).itemsize
