"""The decoder shared by all causal families, which differ only in their configuration."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from inferneo_jax.config import DecoderConfig
from inferneo_jax.layers import rope
from inferneo_jax.layers.attention import CausalAttention
from inferneo_jax.layers.cache import (
    AttentionMetadata,
    KVCache,
    LayerCache,
    MixedMetadata,
    PagedAttention,
)
from inferneo_jax.layers.linear import Embedding, Linear
from inferneo_jax.layers.mlp import SwiGLU
from inferneo_jax.layers.norm import RMSNorm
from inferneo_jax.layers.quantization import QuantizationConfig, Unquantized


class DecoderLayer(nnx.Module):
    """Attention and MLP, each preceded by a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, quantization: QuantizationConfig) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = CausalAttention(config, quantization.within("attention"))
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size, quantization.within("mlp"))

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        angles: tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]],
        attention: PagedAttention,
        cache: LayerCache,
        metadata: AttentionMetadata | MixedMetadata,
    ) -> tuple[Float[Array, "rows tokens embed"], LayerCache]:
        x, cache = self.attention(x, self.attention_norm, angles, attention, cache, metadata)
        return self.mlp(x, self.mlp_norm), cache


@partial(jax.jit, static_argnames=("graphdef", "attention"))
def _run_layer(
    graphdef: nnx.GraphDef[DecoderLayer],
    weights: nnx.State[Any, Any],
    attention: PagedAttention,
    x: Float[Array, "rows tokens embed"],
    angles: tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]],
    cache: LayerCache,
    metadata: AttentionMetadata | MixedMetadata,
) -> tuple[Float[Array, "rows tokens embed"], LayerCache]:
    return nnx.merge(graphdef, weights)(x, angles, attention, cache, metadata)


class Decoder(nnx.Module):
    """Maps token ids to hidden states over a paged KV cache, and hidden states to logits."""

    def __init__(self, config: DecoderConfig, quantization: QuantizationConfig) -> None:
        self.freqs = tuple(
            rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling).tolist()
        )
        table = quantization.head if config.tie_embeddings else Unquantized(quantization.dtype)
        table = quantization.of("embed.table", table)
        self.embed = Embedding(config.vocab_size, config.hidden_size, table, axis="vocab")
        self.layers = nnx.List(
            DecoderLayer(config, quantization.within(f"layers.{index}"))
            for index in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            shape = config.hidden_size, config.vocab_size
            head = quantization.of("head.kernel", quantization.head)
            self.head = Linear(shape, ("embed", "vocab"), head)

    def __call__(
        self,
        tokens: Int[Array, "rows tokens"],
        attention: PagedAttention,
        cache: KVCache,
        metadata: AttentionMetadata | MixedMetadata,
    ) -> tuple[Float[Array, "rows tokens embed"], KVCache]:
        """Run the layers over new tokens and add their keys and values to the cache.

        The layers are unrolled, because a scan over them would copy each layer's cache at every
        step. They are nevertheless traced and lowered once for each set of quantization methods,
        as calls of one function that XLA inlines.
        """
        # Padding is set to zero, so that kernels can detect it cheaply and skip its products.
        x = jnp.where(metadata.live()[..., None], self.embed(tokens), 0.0)
        angles = rope.angles(metadata.positions, jnp.asarray(self.freqs, jnp.float32))
        written: KVCache = []
        for layer, old in zip(self.layers, cache, strict=True):
            graphdef, weights = nnx.split(layer)
            x, new = _run_layer(graphdef, weights, attention, x, angles, old, metadata)
            written.append(new)
        return x, written

    def logits(self, hidden: Float[Array, "rows embed"]) -> Float[Array, "rows part"]:
        """The float32 logits of the next token over this device's part of the vocabulary."""
        x = self.final_norm(hidden)
        return self.head(x) if hasattr(self, "head") else self.embed.attend(x)
