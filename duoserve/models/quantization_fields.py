"""Reads the ``quantization_config`` of a config.json; a field that is not known is refused by name."""

from __future__ import annotations

from collections.abc import Callable

from duoserve.architecture import Quantization, QuantMethod
from duoserve.experts.formats.int4 import row_group
from duoserve.kernels.weights import FP8_BLOCK, INT4_GROUPS, MXFP4_GROUP
from duoserve.models.config_fields import ConfigFields

NAME = "quantization_config"
EXPERTS = ".experts"


def quantization(
    fields: ConfigFields, methods: tuple[QuantMethod, ...], hidden: int, inter: int
) -> Quantization | None:
    """How the checkpoint is quantized, None if it is not; ``methods`` are those that the family supports.

    ``hidden`` and ``inter`` are an expert's sizes, which must be whole groups.
    """
    if fields.is_null(NAME):
        return None
    if not methods:
        raise fields.refusal(NAME, "supported in this family: weights in bfloat16, float16 or float32")
    section = fields.section(NAME)
    found = _PARSERS[section.choice("quant_method", methods)](section)
    if found.method == "mxfp4" and (hidden % MXFP4_GROUP or inter % MXFP4_GROUP):
        raise fields.refusal(NAME, f"groups of {MXFP4_GROUP} do not divide an expert of {hidden} x {inter}")
    if found.method in ("awq", "gptq") and row_group(found.group, hidden, inter) is None:
        raise section.refusal(
            "group_size",
            f"of an expert of {hidden} x {inter} it leaves no groups of {', '.join(map(str, INT4_GROUPS))}",
        )
    return found


def _fp8(section: ConfigFields) -> Quantization:
    section.only(
        *("quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt", "expert_dtype"),
        *("dequantize", "modules_to_convert", *_SKIPS),
    )
    section.flag("dequantize", False)  # tells transformers what to do on loading, and nothing about the file
    section.absent("modules_to_convert", "supported: null")
    section.choice("fmt", ["e4m3"], "e4m3")
    section.choice(
        "activation_scheme", ["dynamic"], "dynamic"
    )  # here activations are not quantized, which loses nothing
    section.choice("scale_fmt", ["float", "ue8m0"], "float")
    section.choice("expert_dtype", ["fp8"], "fp8")
    if section.integers("weight_block_size", 1, 1 << 20) != [FP8_BLOCK, FP8_BLOCK]:
        raise section.refusal("weight_block_size", f"supported: [{FP8_BLOCK}, {FP8_BLOCK}]")
    _check_skips(section)
    return Quantization("fp8")


def _mxfp4(section: ConfigFields) -> Quantization:
    section.only("quant_method", *_SKIPS)
    _check_skips(section)
    return Quantization("mxfp4")


# Lists of modules that are not quantized. The tensors show which these are; the lists do not count, as each program
# matches their names in its own way.
_SKIPS = ("modules_to_not_convert", "ignored_layers")


def _check_skips(section: ConfigFields) -> None:
    for name in _SKIPS:
        if any(EXPERTS in module for module in section.texts(name)):
            raise section.refusal(
                name, "routed experts that are not quantized beside others that are, are not supported"
            )


def _awq(section: ConfigFields) -> Quantization:
    section.only(*_INT4, "zero_point", "version", "checkpoint_format", *_SKIPS, *_OF_NO_EFFECT)
    for name in ("version", "checkpoint_format"):  # GPTQModel writes the second
        _version(section, name, ["gemm", "GEMM"], "gemm")
    for name, supported in (("zero_point", True), ("desc_act", False)):
        if section.flag(name, supported) is not supported:
            raise section.refusal(name, f"supported: {str(supported).lower()}")
    _check_skips(section)
    return Quantization("awq", _group(section))


def _gptq(section: ConfigFields) -> Quantization:
    section.only(*_INT4, "checkpoint_format", "dynamic", "is_marlin_format", *_SKIPS, *_OF_NO_EFFECT)
    version = _version(section, "checkpoint_format", ["gptq", "gptq_v2"], "gptq")
    if section.flag("is_marlin_format", False):
        raise section.refusal("is_marlin_format", "supported: false")
    if not section.is_null("dynamic") and any(name[:1] != "-" for name in section.section("dynamic").names):
        raise section.refusal("dynamic", "supported: rules that leave modules out, which begin with '-'")
    _check_skips(section)
    group, by_activation = _group(section), section.flag("desc_act", False)
    return Quantization(
        "gptq",
        group,
        symmetric=section.flag("sym", True),
        less_one=version == "gptq",
        ordered=by_activation and group > 0,  # a single group has no order
    )


def _version(section: ConfigFields, name: str, supported: list[str], default: str) -> str:
    """The field ``name``, which transformers 5 calls ``format``."""
    return section.choice("format" if section.is_null(name) else name, supported, default)


def _group(section: ConfigFields) -> int:
    """Features in a group; 0 for one group of all features, which files write as -1."""
    for name in _NULL:
        section.absent(name, "supported: null")
    section.integer("bits", 4, 4)
    section.choice("pack_dtype", ["int32"], "int32")
    size = section.integer("group_size", -1, 1 << 20)
    if size == 0:
        raise section.refusal("group_size", "supported: -1 and multiples of 32")
    return max(size, 0)


# If these are null, nothing is added to the weights, and they are not rotated.
_NULL = ("adapter", "rotation")
_INT4 = ("quant_method", "bits", "group_size", "format", "sym", "desc_act", "pack_dtype", "lm_head", *_NULL)
# These say how the codes were found, or how some other program is to run them.
_OF_NO_EFFECT = (
    *("act_group_aware", "backend", "batch_size", "block_name_to_quantize", "buffered_fwd", "cache_block_outputs"),
    *("damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "do_fuse", "exllama_config", "fail_safe"),
    *("fuse_max_seq_len", "gptaq", "gptaq_alpha", "gptaq_memory_device", "hessian_chunk_size", "hyb_act"),
    *("max_input_length", "meta", "method", "mock_quantization", "model_file_base_name", "model_name_or_path"),
    *("model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_fuse", "mse"),
    *("offload_to_disk", "offload_to_disk_path", "pack_impl", "pad_token_id", "static_groups", "tokenizer"),
    *("true_sequential", "use_cuda_fp16", "use_exllama", "use_marlin", "v2", "v2_alpha", "v2_memory_device"),
)
_PARSERS: dict[str, Callable[[ConfigFields], Quantization]] = {"awq": _awq, "fp8": _fp8, "gptq": _gptq, "mxfp4": _mxfp4}
