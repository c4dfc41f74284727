"""The bidirectional encoder that turns texts into embeddings (arXiv:1810.04805, 1908.10084)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from inferneo_jax.config import EncoderConfig
from inferneo_jax.layers.attention import BidirectionalAttention
from inferneo_jax.layers.linear import Embedding, Linear
from inferneo_jax.layers.mlp import gelu
from inferneo_jax.layers.norm import LayerNorm
from inferneo_jax.layers.quantization import QuantizationConfig, Unquantized
from inferneo_jax.layers.segments import SegmentAttention, Segments


class GeluMLP(nnx.Module):
    """``down(gelu(up(x)))`` with the exact, error-function GELU."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        embed, mlp = config.hidden_size, config.mlp_size
        up, down = quantization.of("up.kernel"), quantization.of("down.kernel")
        self.up = Linear((embed, mlp), ("embed", "mlp"), up, bias=True)
        self.down = Linear((mlp, embed), ("mlp", "embed"), down, bias=True)

    def __call__(
        self, x: Float[Array, "tokens embed"], norm: LayerNorm, live: Int[Array, ""]
    ) -> Float[Array, "tokens embed"]:
        """Return ``norm(x + down(gelu(up(x))))``; only the first ``live`` tokens matter."""
        wide = self.up(x, transform=gelu, narrow=True, live=live)
        return self.down(wide, residual=x, transform=norm, live=live)


class EncoderLayer(nnx.Module):
    """Attention and MLP, each added to the residual stream, which is then normalized."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        self.attention = BidirectionalAttention(config, quantization.within("attention"))
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GeluMLP(config, quantization.within("mlp"))
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def __call__(
        self, x: Float[Array, "tokens embed"], attention: SegmentAttention, segments: Segments
    ) -> Float[Array, "tokens embed"]:
        x = self.attention(x, self.attention_norm, attention, segments)
        return self.mlp(x, self.mlp_norm, segments.live)


@partial(jax.jit, static_argnames=("graphdef", "attention"))
def _run_layer(
    graphdef: nnx.GraphDef[EncoderLayer],
    weights: nnx.State[Any, Any],
    x: Float[Array, "tokens embed"],
    attention: SegmentAttention,
    segments: Segments,
) -> Float[Array, "tokens embed"]:
    """Run one layer; a separate function, so that it is traced and lowered once for all alike."""
    return nnx.merge(graphdef, weights)(x, attention, segments)


class Encoder(nnx.Module):
    """Maps the token ids of packed texts to one vector per text."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        embed, table = config.hidden_size, Unquantized(quantization.dtype)
        self.pooling = config.pooling
        self.normalize = config.normalize
        self.embed = Embedding(config.vocab_size, embed, table, axis="vocab")
        self.position = Embedding(config.num_positions, embed, table)
        self.token_type = Embedding(config.num_token_types, embed, table)
        self.embed_norm = LayerNorm(embed, config.norm_eps)
        self.layers = nnx.List(
            EncoderLayer(config, quantization.within(f"layers.{index}"))
            for index in range(config.num_layers)
        )

    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        cu_seqlens: Int[Array, " segments_and_one"],
        attention: SegmentAttention,
    ) -> Float[Array, "segments embed"]:
        """Embed packed texts, one per segment; an empty segment gives a finite, arbitrary vector.

        Args:
            tokens: the token ids of the packed texts, followed by padding.
            cu_seqlens: the index of each segment's first token, then the end of the last segment.
            attention: the implementation of attention within segments.
        """
        segments = Segments.of(cu_seqlens, tokens.shape[0])
        x = self.embed(tokens) + self.position(segments.positions)
        x = self.embed_norm(x + self.token_type(jnp.zeros_like(tokens)))
        for layer in self.layers:
            x = _run_layer(*nnx.split(layer), x, attention, segments)
        pooled = x[cu_seqlens[:-1]] if self.pooling == "cls" else segments.mean(x)
        if not self.normalize:
            return pooled
        norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled / jnp.maximum(norm, 1e-12)
