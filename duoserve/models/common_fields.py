"""What the families' ``config.json`` files have in common."""

from __future__ import annotations

from duoserve.architecture import AttentionConfig, Blocks, QuantMethod, RouterConfig
from duoserve.config import ModelConfig
from duoserve.experts.safetensors_header import MAX_TENSORS
from duoserve.models.config_fields import MAX_TOKEN_ID, ConfigFields
from duoserve.models.quantization_fields import quantization
from duoserve.models.rope_fields import MAX_POSITIONS

MAX_WIDTH = 1 << 20
# The formats in which every matrix of every expert has tensors of its own.
ONE_TENSOR_A_MATRIX: tuple[QuantMethod, ...] = ("awq", "fp8", "gptq")
SLIDING, FULL = "sliding_attention", "full_attention"


def refuse_unsupported(fields: ConfigFields) -> None:
    """Raises ConfigError for fields that no family can compute."""
    fields.choice("hidden_act", ["silu"])
    if not fields.flag("is_causal", True):
        raise fields.refusal("is_causal", "supported: true")
    if fields.is_set("per_layer_config"):
        raise fields.refusal("per_layer_config", "supported: null; a field holds for all layers")


def model_config(
    fields: ConfigFields, model_type: str, blocks: Blocks, formats: tuple[QuantMethod, ...] = ONE_TENSOR_A_MATRIX
) -> ModelConfig:
    """The config of a model of ``blocks``; all other fields have the same names in all families.

    ``formats`` are the quantized formats that the family's experts may have.
    """
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size", 1, 4 << 20),
        hidden_size=hidden_size(fields),
        num_layers=num_layers(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 0, 1),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, MAX_POSITIONS),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        bos_token_id=fields.optional_integer("bos_token_id", 0, MAX_TOKEN_ID),
        eos_token_ids=fields.token_ids("eos_token_id"),
        blocks=blocks,
        quantization=quantization(fields, formats, hidden_size(fields), blocks.moe.expert_intermediate_size),
    )


def hidden_size(fields: ConfigFields) -> int:
    """Width of the residual stream."""
    return fields.integer("hidden_size", 1, 131072)


def num_layers(fields: ConfigFields) -> int:
    """Layers that are computed."""
    return fields.integer("num_hidden_layers", 1, 1000)


def num_heads(fields: ConfigFields) -> int:
    """Query heads."""
    return fields.integer("num_attention_heads", 1, 4096)


def grouped_query(fields: ConfigFields) -> AttentionConfig:
    """Plain grouped-query attention: every token sees all before it, and scores are divided by sqrt(``head_dim``)."""
    heads, dim = num_heads(fields), head_dim(fields)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads", 1, heads) or heads,
        head_dim=dim,
        scale=dim**-0.5,
        windows=(None,) * num_layers(fields),
    )


def head_dim(fields: ConfigFields) -> int:
    """Dimensions of a head; if the field is null or absent, the heads share the hidden size."""
    hidden, heads = hidden_size(fields), num_heads(fields)
    given = fields.optional_integer("head_dim", 1, 1024)
    if given is None and hidden % heads:
        raise fields.refusal("hidden_size", f"num_attention_heads ({heads}) must divide it if head_dim is absent")
    return given or hidden // heads


def used_window(fields: ConfigFields) -> int | None:
    """Qwen's window, which is used only if ``use_sliding_window`` is true; else None."""
    if not fields.flag("use_sliding_window"):
        return None
    return fields.optional_integer("sliding_window", 1, MAX_POSITIONS)


def layer_windows(fields: ConfigFields, window: int | None, slides: list[bool]) -> tuple[int | None, ...]:
    """The window of each layer. ``layer_types`` says which layers have one or, if it is absent, ``slides`` does."""
    kinds = fields.choices("layer_types", (FULL, SLIDING), num_layers(fields))
    slides = [kind == SLIDING for kind in kinds] or slides
    if any(slides) and window is None:
        if not fields.is_null("sliding_window"):  # it is there, but use_sliding_window is false
            raise fields.refusal("use_sliding_window", "layer_types has layers that slide, so it must be true")
        raise fields.refusal("sliding_window", "layers slide, so it must be a number of positions")
    return tuple(window if sliding else None for sliding in slides)


def num_experts(fields: ConfigFields, name: str) -> int:
    """Routed experts of a layer, from the field ``name``; bounded, as all layers have tensors for each."""
    experts, layers = fields.integer(name, 1, 4096), num_layers(fields)
    if 3 * layers * experts > MAX_TENSORS:
        raise fields.refusal(name, f"with {layers} layers, that is more tensors than {MAX_TENSORS}")
    return experts


def top_k(fields: ConfigFields, experts: int) -> int:
    """Experts that a token takes."""
    return fields.integer("num_experts_per_tok", 1, experts)


def width(fields: ConfigFields, name: str) -> int:
    """The intermediate size ``name`` of an expert or a dense layer."""
    return fields.integer(name, 1, MAX_WIDTH)


def sparse_layers(fields: ConfigFields) -> tuple[int, ...]:
    """Qwen's MoE layers: every ``decoder_sparse_step``-th, except those in ``mlp_only_layers``."""
    layers, step = num_layers(fields), fields.integer("decoder_sparse_step", 1, 1000)
    dense = fields.integers("mlp_only_layers", 0, 1000)
    sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    if not sparse:
        raise fields.refusal("mlp_only_layers", f"with decoder_sparse_step {step}, no layer has experts")
    return sparse


def layers_behind_dense(fields: ConfigFields) -> tuple[int, ...]:
    """DeepSeek's and GLM's MoE layers: all behind the first ``first_k_dense_replace``."""
    if fields.integer("moe_layer_freq", 1, 1000, 1) != 1:
        raise fields.refusal("moe_layer_freq", "supported: 1")
    layers = num_layers(fields)
    return tuple(range(fields.integer("first_k_dense_replace", 0, layers - 1), layers))


def shared_experts(fields: ConfigFields) -> int:
    """The number of shared experts; they are stored as one network as wide as all of them together."""
    return fields.integer("n_shared_experts", 1, 1024)


def mtp_layers(fields: ConfigFields) -> int:
    """The number of layers behind the last, which guess further tokens."""
    return fields.optional_integer("num_nextn_predict_layers", 0, 1000) or 0


def corrected_router(fields: ConfigFields) -> RouterConfig:
    """The router of DeepSeek-V3 and GLM: sigmoid scores, a correction of them for the choice, and groups."""
    fields.choice("scoring_func", ["sigmoid"], "sigmoid")
    fields.choice("topk_method", ["noaux_tc"], "noaux_tc")
    experts = num_experts(fields, "n_routed_experts")
    chosen = top_k(fields, experts)
    n_group, topk_group = groups(fields, experts, chosen, least=2)
    return RouterConfig(
        num_experts=experts,
        top_k=chosen,
        scoring="sigmoid",
        renormalize=fields.flag("norm_topk_prob"),
        scale=fields.number("routed_scaling_factor", 0, 1e6),
        n_group=n_group,
        topk_group=topk_group,
        wide=True,
        correction=True,
    )


def groups(fields: ConfigFields, experts: int, chosen: int, least: int) -> tuple[int, int]:
    """The number of groups, each of at least ``least`` experts, and from how many of them experts may be chosen."""
    n_group = fields.integer("n_group", 1, experts)
    if experts % n_group or experts // n_group < least:
        raise fields.refusal("n_group", f"{experts} experts must form equal groups of at least {least}")
    topk_group = fields.integer("topk_group", 1, n_group)
    if topk_group * (experts // n_group) < chosen:
        raise fields.refusal("topk_group", f"{chosen} experts are to be chosen from groups of {experts // n_group}")
    return n_group, topk_group
