"""Qwen3: the Llama layout with an RMS norm on each head's query and key."""

from inferneo_jax.config import DecoderConfig
from inferneo_jax.models.families import llama
from inferneo_jax.models.families.family import Family, HFConfig, expect


def read_config(config: HFConfig) -> DecoderConfig:
    """A Qwen3 config; its head_dim is its own, not hidden_size over heads."""
    expect(config, "attention_bias", False)
    return llama.read_decoder({"head_dim": 128, **config}, qk_norm=True)


QWEN3 = Family(
    name="qwen3",
    kind="decoder",
    architectures=frozenset({"Qwen3ForCausalLM"}),
    model_types=frozenset({"qwen3"}),
    read_config=read_config,
    recipes=llama.recipes,
    ignored=llama.ignored,
)
