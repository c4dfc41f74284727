"""Qwen3: Llama's layout with an RMS norm on each head's query and key."""

from inferneo_jax.config import DecoderConfig
from inferneo_jax.models.families import llama
from inferneo_jax.models.families.family import Family, HFConfig, expect


def read_config(config: HFConfig) -> DecoderConfig:
    """Read a Qwen3 config; ``head_dim`` defaults to 128, not to hidden_size / heads."""
    expect(config, "attention_bias", False)
    return llama.read_decoder({"head_dim": 128, **config}, qk_norm=True)


QWEN3 = Family(
    name="qwen3",
    kind="decoder",
    architectures=frozenset({"Qwen3ForCausalLM"}),
    model_types=frozenset({"qwen3"}),
    read_config=read_config,
    weight_map=llama.weight_map,
    ignored=llama.ignored,
)
