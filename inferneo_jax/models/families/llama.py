"""Llama, Mistral and SmolLM2, and the layout that Qwen2, Qwen3 and Phi-3 derive from."""

from functools import partial

import numpy as np

from inferneo_jax.config import DecoderConfig, RopeScaling
from inferneo_jax.errors import ConfigError
from inferneo_jax.files import shown
from inferneo_jax.models.families.family import (
    Array,
    Family,
    HFConfig,
    SourceTensor,
    WeightMapping,
    copied,
    expect,
    flag,
    integer,
    names,
    number,
    table,
    transposed,
)


def read_config(config: HFConfig) -> DecoderConfig:
    """Read a Llama or Mistral config; biases of linear layers are not supported."""
    expect(config, "attention_bias", False)
    return read_decoder(config)


def read_decoder(
    config: HFConfig, *, qkv_bias: bool = False, qk_norm: bool = False
) -> DecoderConfig:
    """Read what the configs of all families of this layout share.

    Args:
        config: of Hugging Face.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether each head's query and key is normalised.

    Raises:
        ConfigError: for sliding windows, unknown RoPE scaling, activations other than SiLU,
            biases in the MLP, partial rotation, and quantized tensors.
    """
    expect(config, "hidden_act", "silu", "swish")
    expect(config, "mlp_bias", False)
    expect(config, "partial_rotary_factor", 1, 1.0)
    if quantization := table(config, "quantization_config"):
        method = shown(quantization.get("quant_method"))
        raise ConfigError(
            f"the tensors are quantized ({method}); take the model's unquantized or GGUF release"
        )
    context_length = integer(config, "max_position_embeddings")
    _refuse_sliding_window(config, context_length)
    hidden_size = integer(config, "hidden_size")
    num_heads = integer(config, "num_attention_heads")
    rope_theta, rope_scaling = _read_rope(config, context_length)
    return DecoderConfig(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        mlp_size=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=integer(config, "num_key_value_heads", num_heads),
        head_dim=integer(config, "head_dim", hidden_size // num_heads),
        context_length=context_length,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def _refuse_sliding_window(config: HFConfig, context_length: int) -> None:
    if config.get("use_sliding_window") is False:
        return
    window = None
    if config.get("sliding_window") is not None:
        window = integer(config, "sliding_window")
    # A window as long as the context hides nothing.
    if window is not None and window < context_length:
        raise ConfigError(
            f"sliding_window is {window}, shorter than the context of {context_length}; "
            "sliding window attention is not supported"
        )
    if "sliding_attention" in names(config, "layer_types") and window is None:
        raise ConfigError("layer_types has sliding_attention, which is not supported")


def _read_rope(config: HFConfig, context_length: int) -> tuple[float, RopeScaling | None]:
    """Read RoPE's base and scaling, from ``rope_parameters`` or the two keys that it replaced."""
    parameters = table(config, "rope_parameters")
    scaling = parameters or table(config, "rope_scaling")
    if parameters:
        expect(parameters, "partial_rotary_factor", 1, 1.0)
        theta = number(parameters, "rope_theta", 10_000.0)
    else:
        theta = number(config, "rope_theta", 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=number(scaling, "factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=number(scaling, "factor"),
            low_freq_factor=number(scaling, "low_freq_factor", 1.0),
            high_freq_factor=number(scaling, "high_freq_factor", 4.0),
            original_context_length=integer(
                scaling, "original_max_position_embeddings", context_length
            ),
        )
    raise ConfigError(
        f"rope scaling {shown(kind)} is not supported; default, linear and llama3 are"
    )


def weight_map(config: DecoderConfig) -> dict[str, WeightMapping]:
    """Map every weight of a decoder to the tensors of a checkpoint in Llama's layout."""
    weights = {
        "embed.table": copied("model.embed_tokens.weight", config.vocab_size, config.hidden_size),
        "final_norm.scale": copied("model.norm.weight", config.hidden_size),
    }
    if not config.tie_embeddings:
        weights["head.kernel"] = transposed("lm_head.weight", config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        for name, mapping in _layer(config, f"model.layers.{index}").items():
            weights[f"layers.{index}.{name}"] = mapping
    return weights


def _layer(config: DecoderConfig, prefix: str) -> dict[str, WeightMapping]:
    width, mlp, dim = config.hidden_size, config.mlp_size, config.head_dim
    kv_heads, group = config.num_kv_heads, config.group_size
    attention = f"{prefix}.self_attn"
    rows = {"q_proj": config.num_heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}

    weights = {
        "attention_norm.scale": copied(f"{prefix}.input_layernorm.weight", width),
        "attention.qkv.kernel": WeightMapping(
            tuple(SourceTensor(f"{attention}.{p}.weight", (n, width)) for p, n in rows.items()),
            (width, kv_heads, group + 2, dim),
            partial(fuse_heads, config),
            kernel=True,
        ),
        "attention.out.kernel": transposed(
            f"{attention}.o_proj.weight", width, config.num_heads * dim, kv_heads, group, dim, width
        ),
        "mlp_norm.scale": copied(f"{prefix}.post_attention_layernorm.weight", width),
        "mlp.gate_up.kernel": WeightMapping(
            tuple(
                SourceTensor(f"{prefix}.mlp.{p}_proj.weight", (mlp, width)) for p in ("gate", "up")
            ),
            (width, 2, mlp),
            kernel=True,
        ),
        "mlp.down.kernel": transposed(f"{prefix}.mlp.down_proj.weight", width, mlp),
    }
    if config.qkv_bias:
        weights["attention.qkv.bias"] = WeightMapping(
            tuple(SourceTensor(f"{attention}.{p}.bias", (n,)) for p, n in rows.items()),
            (kv_heads, group + 2, dim),
            partial(fuse_heads, config),
        )
    if config.qk_norm:
        weights["attention.q_norm.scale"] = copied(f"{attention}.q_norm.weight", dim)
        weights["attention.k_norm.scale"] = copied(f"{attention}.k_norm.weight", dim)
    return weights


def fuse_heads(config: DecoderConfig, *arrays: Array) -> Array:
    """Arrange queries, keys and values: for each KV head its queries, its key, and its value.

    Args:
        config: of the decoder.
        arrays: the rows of queries, keys and values, each ``[heads * head_dim, ...]``.

    Returns:
        ``[kv_heads * (group + 2) * head_dim, ...]``.
    """
    split = config.num_kv_heads, -1, config.head_dim
    heads = np.concatenate([a.reshape(*split, *a.shape[1:]) for a in arrays], axis=1)
    return heads.reshape(-1, *arrays[0].shape[1:])


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """Buffers of old checkpoints, and the output layer if it is only a copy of the embeddings."""
    buffers = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    return (*buffers, r"lm_head\.weight") if config.tie_embeddings else buffers


LLAMA = Family(
    name="llama",
    kind="decoder",
    architectures=frozenset({"LlamaForCausalLM", "MistralForCausalLM"}),
    model_types=frozenset({"llama", "mistral"}),
    read_config=read_config,
    weight_map=weight_map,
    ignored=ignored,
)
