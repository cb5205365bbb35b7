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
    section.flag("zero_point", True)  # if it is false, the file has zero-points too: each is 8
    if section.flag("desc_act", False):
        raise section.refusal("desc_act", "supported: false")
    _check_left_out(section)
    return Quantization("awq", _group(section))


def _gptq(section: ConfigFields) -> Quantization:
    section.only(*_INT4, "checkpoint_format", "is_marlin_format", *_SKIPS, *_OF_NO_EFFECT)
    version = _version(section, "checkpoint_format", ["gptq", "gptq_v2"], "gptq")
    if section.flag("is_marlin_format", False):
        raise section.refusal("is_marlin_format", "supported: false")
    _check_left_out(section)
    group, by_activation = _group(section), section.flag("desc_act", False)
    return Quantization(
        "gptq",
        group,
        symmetric=section.flag("sym", True),
        less_one=version == "gptq",
        ordered=by_activation and group > 0,  # a single group has no order
    )


def _check_left_out(section: ConfigFields) -> None:
    """Checks what is quantized otherwise than the others: it may only be left out. Which it is, the tensors show."""
    if not section.is_null("dynamic") and any(name[:1] != "-" for name in section.section("dynamic").names):
        raise section.refusal("dynamic", "supported: rules that leave modules out, which begin with '-'")
    _check_skips(section)


def _version(section: ConfigFields, name: str, supported: list[str], default: str) -> str:
    """The field ``name``, which transformers 5 calls ``format``."""
    return section.choice("format" if section.is_null(name) else name, supported, default)


def _group(section: ConfigFields) -> int:
    """Features in a group; 0 for one group of all features, which files write as -1."""
    for name in _NULL:
        if section.is_set(name):
            raise section.refusal(name, "supported: null")
    section.integer("bits", 4, 4)
    section.optional_integer("act_bits", 16, 32)  # activations are not quantized
    section.choice("data_type", ["int"], "int")
    section.choice("pack_dtype", ["int32"], "int32")
    size = section.integer("group_size", -1, 1 << 20)
    if size == 0:
        raise section.refusal("group_size", "supported: -1 and multiples of 32")
    return max(size, 0)


# If these are null, nothing is added to the weights, they are not rotated, all are quantized alike, and scales,
# attention and cache are not quantized.
_NULL = (
    *("adapter", "rotation", "rotation_configs", "regex_config", "super_bits", "super_group_size"),
    *("static_attention_dtype", "static_kv_dtype"),
)
_INT4 = (
    *("quant_method", "bits", "group_size", "format", "sym", "desc_act", "pack_dtype", "lm_head", "dynamic"),
    *("act_bits", "data_type", *_NULL),
)
# These say how the codes were found, how some other program is to run them, or more of what is ruled out above.
_OF_NO_EFFECT = (
    *("act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym", "amp", "autoround_version"),
    *("backend", "batch_size", "block_name_to_quantize", "buffered_fwd", "cache_block_outputs", "damp_auto_increment"),
    *("damp_percent", "dataset", "disable_exllama", "do_fuse", "enable_minmax_tuning", "enable_norm_bias_tuning"),
    *("enable_quanted_input", "exllama_config", "fail_safe", "fuse_max_seq_len", "gptaq", "gptaq_alpha"),
    *("gptaq_memory_device", "gradient_accumulate_steps", "hessian_chunk_size", "hyb_act", "iters"),
    *("low_gpu_mem_usage", "lr", "max_input_length", "meta", "method", "minmax_lr", "mock_quantization"),
    *("model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block"),
    *("modules_in_block_to_quantize", "modules_to_fuse", "mse", "n_samples", "nsamples", "offload_to_disk"),
    *("offload_to_disk_path", "pack_impl", "pad_token_id", "provider", "quant_block_list", "scale_dtype", "seqlen"),
    *("static_attention_granularity", "static_groups", "static_kv_granularity", "supported_types"),
    *("to_quant_block_names", "tokenizer", "train_bs", "true_sequential", "use_cuda_fp16", "use_exllama"),
    *("use_marlin", "v2", "v2_alpha", "v2_memory_device"),
)
_PARSERS: dict[str, Callable[[ConfigFields], Quantization]] = {"awq": _awq, "fp8": _fp8, "gptq": _gptq, "mxfp4": _mxfp4}
