"""Qwen2 and Qwen2.5: the Llama layout with biases on queries, keys and values."""

from inferneo_jax.config import DecoderConfig
from inferneo_jax.models.families import llama
from inferneo_jax.models.families.family import Family, HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """A Qwen2 config; the biases are part of the architecture and named nowhere in it."""
    return llama.read_decoder(config, qkv_bias=True)


QWEN2 = Family(
    name="qwen2",
    kind="decoder",
    architectures=frozenset({"Qwen2ForCausalLM"}),
    model_types=frozenset({"qwen2"}),
    read_config=read_config,
    recipes=llama.recipes,
    ignored=llama.ignored,
)
