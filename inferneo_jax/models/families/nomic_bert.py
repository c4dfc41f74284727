"""Nomic's BERT with rotary positions, SwiGLU and no biases, such as nomic-embed-text."""

from inferneo_jax.config import EncoderConfig
from inferneo_jax.models.families.family import (
    Family,
    HFConfig,
    SourceTensor,
    WeightMapping,
    copied,
    expect,
    flag,
    integer,
    normed,
    number,
    table,
    transposed,
)

# The keys of nomic's own code, and what transformers calls them.
_RENAMED = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}


def read_config(config: HFConfig) -> EncoderConfig:
    """Read a config of nomic's own code or of transformers.

    Inputs are limited to the length that the model was trained for, 2,048 tokens. Nomic's code
    reads longer ones, up to ``n_positions``, with other rotary frequencies.

    Raises:
        ConfigError: for biases, experts, partial or interleaved rotation, norms before the blocks,
            and activations other than SwiGLU.
    """
    config = {**config, **{new: config[old] for old, new in _RENAMED.items() if old in config}}
    expect(config, "activation_function", "swiglu")
    expect(config, "hidden_act", "silu")
    expect(config, "rotary_emb_fraction", 1, 1.0)
    expect(config, "rotary_emb_scale_base")
    expect(config, "moe_every_n_layers", 0)
    expect(config, "partial_rotary_factor", 1, 1.0)
    expect(config, "rope_scaling")
    for key in (
        "causal",
        "is_decoder",
        "mlp_fc1_bias",
        "mlp_fc2_bias",
        "parallel_block",
        "prenorm",
        "qkv_proj_bias",
        "rotary_emb_interleaved",
        "use_rms_norm",
    ):
        expect(config, key, False)
    rope = table(config, "rope_parameters")
    expect(rope, "rope_type", "default")
    theta = config.get("rotary_emb_base", rope.get("rope_theta", config.get("rope_theta")))
    num_positions = integer(config, "max_position_embeddings")
    sentence = table(config, "sentence_transformers")
    expect(sentence, "pooling", "mean", "cls")
    return EncoderConfig(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        mlp_size=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=integer(config, "num_attention_heads"),
        num_positions=num_positions,
        max_tokens=min(
            num_positions,
            integer(config, "max_trained_positions", 2048),
            integer(sentence, "max_seq_length", num_positions),
        ),
        num_token_types=integer(config, "type_vocab_size", 2),
        norm_eps=number(config, "layer_norm_eps", 1e-12),
        rope_theta=number({"rope_theta": theta}, "rope_theta", 1000.0),
        mlp="swiglu",
        biases=False,
        pooling=sentence.get("pooling", "mean"),
        normalize=flag(sentence, "normalize", True),
    )


def weight_map(config: EncoderConfig) -> dict[str, WeightMapping]:
    """Map every weight of an encoder to the tensors of a NomicBertModel."""
    width = config.hidden_size
    weights = {
        "embed.table": copied("embeddings.word_embeddings.weight", config.vocab_size, width),
        "token_type.table": copied(
            "embeddings.token_type_embeddings.weight", config.num_token_types, width
        ),
        **normed("embed_norm", "emb_ln", width),
    }
    for index in range(config.num_layers):
        for name, mapping in _layer(config, f"encoder.layers.{index}").items():
            weights[f"layers.{index}.{name}"] = mapping
    return weights


def _layer(config: EncoderConfig, prefix: str) -> dict[str, WeightMapping]:
    width, mlp, heads, dim = config.hidden_size, config.mlp_size, config.num_heads, config.head_dim
    gate_up = tuple(
        SourceTensor(f"{prefix}.mlp.{p}.weight", (mlp, width)) for p in ("fc12", "fc11")
    )

    return {
        "attention.qkv.kernel": transposed(
            f"{prefix}.attn.Wqkv.weight", 3 * width, width, width, 3, heads, dim
        ),
        "attention.out.kernel": transposed(
            f"{prefix}.attn.out_proj.weight", width, width, heads, dim, width
        ),
        **normed("attention_norm", f"{prefix}.norm1", width),
        "mlp.gate_up.kernel": WeightMapping(gate_up, (width, 2, mlp), kernel=True),
        "mlp.down.kernel": transposed(f"{prefix}.mlp.fc2.weight", width, mlp),
        **normed("mlp_norm", f"{prefix}.norm2", width),
    }


def ignored(config: EncoderConfig) -> tuple[str, ...]:
    """The pre-training head, which embeddings do not use."""
    del config
    return (r"cls\.predictions\..*",)


NOMIC_BERT = Family(
    name="nomic_bert",
    kind="encoder",
    architectures=frozenset({"NomicBertModel", "NomicBertForMaskedLM", "NomicBertForPreTraining"}),
    model_types=frozenset({"nomic_bert"}),
    read_config=read_config,
    weight_map=weight_map,
    ignored=ignored,
    prefixes=("", "bert.", "nomic_bert."),
)
