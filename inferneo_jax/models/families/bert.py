"""BERT encoders for sentence embeddings, such as all-MiniLM."""

from inferneo_jax.config import EncoderConfig
from inferneo_jax.errors import ConfigError
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


def read_config(config: HFConfig) -> EncoderConfig:
    """Read a BERT config, with sentence-transformers' settings of pooling and length if present.

    Raises:
        ConfigError: for relative positions, decoders, and activations other than the exact GELU.
    """
    expect(config, "hidden_act", "gelu")
    expect(config, "position_embedding_type", "absolute")
    expect(config, "is_decoder", False)
    num_positions = integer(config, "max_position_embeddings")
    sentence = table(config, "sentence_transformers")
    max_tokens = integer(sentence, "max_seq_length", num_positions)
    if max_tokens > num_positions:
        raise ConfigError(
            f"max_seq_length is {max_tokens}; the model has only {num_positions} positions"
        )
    expect(sentence, "pooling", "mean", "cls")
    return EncoderConfig(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        mlp_size=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=integer(config, "num_attention_heads"),
        num_positions=num_positions,
        max_tokens=max_tokens,
        num_token_types=integer(config, "type_vocab_size", 2),
        norm_eps=number(config, "layer_norm_eps", 1e-12),
        pooling=sentence.get("pooling", "mean"),
        normalize=flag(sentence, "normalize", True),
    )


def weight_map(config: EncoderConfig) -> dict[str, WeightMapping]:
    """Map every weight of an encoder to the tensors of a BertModel."""
    width = config.hidden_size
    weights = {
        "embed.table": copied("embeddings.word_embeddings.weight", config.vocab_size, width),
        "position.table": copied(
            "embeddings.position_embeddings.weight", config.num_positions, width
        ),
        "token_type.table": copied(
            "embeddings.token_type_embeddings.weight", config.num_token_types, width
        ),
        **normed("embed_norm", "embeddings.LayerNorm", width),
    }
    for index in range(config.num_layers):
        for name, mapping in _layer(config, f"encoder.layer.{index}").items():
            weights[f"layers.{index}.{name}"] = mapping
    return weights


def _layer(config: EncoderConfig, prefix: str) -> dict[str, WeightMapping]:
    width, mlp, heads, dim = config.hidden_size, config.mlp_size, config.num_heads, config.head_dim
    projections = [f"{prefix}.attention.self.{p}" for p in ("query", "key", "value")]

    return {
        "attention.qkv.kernel": WeightMapping(
            tuple(SourceTensor(f"{p}.weight", (width, width)) for p in projections),
            (width, 3, heads, dim),
            kernel=True,
        ),
        "attention.qkv.bias": WeightMapping(
            tuple(SourceTensor(f"{p}.bias", (width,)) for p in projections), (3, heads, dim)
        ),
        "attention.out.kernel": transposed(
            f"{prefix}.attention.output.dense.weight", width, width, heads, dim, width
        ),
        "attention.out.bias": copied(f"{prefix}.attention.output.dense.bias", width),
        **normed("attention_norm", f"{prefix}.attention.output.LayerNorm", width),
        "mlp.up.kernel": transposed(f"{prefix}.intermediate.dense.weight", mlp, width),
        "mlp.up.bias": copied(f"{prefix}.intermediate.dense.bias", mlp),
        "mlp.down.kernel": transposed(f"{prefix}.output.dense.weight", width, mlp),
        "mlp.down.bias": copied(f"{prefix}.output.dense.bias", width),
        **normed("mlp_norm", f"{prefix}.output.LayerNorm", width),
    }


def ignored(config: EncoderConfig) -> tuple[str, ...]:
    """The pooler and the pre-training heads, which embeddings do not use, and index buffers."""
    del config
    return (
        r"(bert\.)?embeddings\.position_ids",
        r"(bert\.)?embeddings\.token_type_ids",
        r"(bert\.)?pooler\.dense\.(weight|bias)",
        r"cls\.(predictions|seq_relationship)\..*",
    )


BERT = Family(
    name="bert",
    kind="encoder",
    architectures=frozenset({"BertModel", "BertForMaskedLM", "BertForPreTraining"}),
    model_types=frozenset({"bert"}),
    read_config=read_config,
    weight_map=weight_map,
    ignored=ignored,
    prefixes=("", "bert."),
)
