"""Qwen2 and Qwen2.5: Llama's layout with biases on queries, keys and values."""

from inferneo_jax.config import DecoderConfig
from inferneo_jax.models.families import llama
from inferneo_jax.models.families.family import Family, HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """Read a Qwen2 config, which does not mention the biases that the architecture always has."""
    return llama.read_decoder(config, qkv_bias=True)


QWEN2 = Family(
    name="qwen2",
    kind="decoder",
    architectures=frozenset({"Qwen2ForCausalLM"}),
    model_types=frozenset({"qwen2"}),
    read_config=read_config,
    weight_map=llama.weight_map,
    ignored=llama.ignored,
)
