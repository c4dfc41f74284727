"""The bidirectional encoder that turns texts into embeddings (arXiv:1810.04805, 1908.10084).

Its variants differ in how they know positions (a table, or rotary embeddings), in the MLP, and in
whether linear layers have biases.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from inferneo_jax.config import EncoderConfig
from inferneo_jax.layers.attention import BidirectionalAttention
from inferneo_jax.layers.linear import Embedding, Linear
from inferneo_jax.layers.mlp import gate, gelu
from inferneo_jax.layers.norm import LayerNorm
from inferneo_jax.layers.quantization import QuantizationConfig, Unquantized
from inferneo_jax.layers.rope import angles, frequencies
from inferneo_jax.layers.segments import SegmentAttention, Segments

Angles = tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]
"""Cosines and sines of each token's position within its segment."""


class GeluMLP(nnx.Module):
    """``down(gelu(up(x)))`` with the exact, error-function GELU."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        embed, mlp = config.hidden_size, config.mlp_size
        up, down = quantization.of("up.kernel"), quantization.of("down.kernel")
        self.up = Linear((embed, mlp), ("embed", "mlp"), up, bias=config.biases)
        self.down = Linear((mlp, embed), ("mlp", "embed"), down, bias=config.biases)

    def __call__(
        self, x: Float[Array, "tokens embed"], norm: LayerNorm, live: Int[Array, ""]
    ) -> Float[Array, "tokens embed"]:
        """Return ``norm(x + down(gelu(up(x))))``; only the first ``live`` tokens matter."""
        wide = self.up(x, transform=gelu, narrow=True, live=live)
        return self.down(wide, residual=x, transform=norm, live=live)


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202); gate and up share one kernel."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        embed, mlp = config.hidden_size, config.mlp_size
        gate_up, down = quantization.of("gate_up.kernel"), quantization.of("down.kernel")
        self.gate_up = Linear((embed, 2, mlp), ("embed", None, "mlp"), gate_up, bias=config.biases)
        self.down = Linear((mlp, embed), ("mlp", "embed"), down, bias=config.biases)

    def __call__(
        self, x: Float[Array, "tokens embed"], norm: LayerNorm, live: Int[Array, ""]
    ) -> Float[Array, "tokens embed"]:
        """Return ``norm(x + mlp(x))``; only the first ``live`` tokens matter."""
        both = self.gate_up(x, live=live).reshape(x.shape[0], -1)
        return self.down(both, prologue=gate, residual=x, transform=norm, live=live)


class EncoderLayer(nnx.Module):
    """Attention and MLP, each added to the residual stream, which is then normalized."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        self.attention = BidirectionalAttention(config, quantization.within("attention"))
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        mlp = GatedMLP if config.mlp == "swiglu" else GeluMLP
        self.mlp = mlp(config, quantization.within("mlp"))
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        rope: Angles | None,
        attention: SegmentAttention,
        segments: Segments,
    ) -> Float[Array, "tokens embed"]:
        x = self.attention(x, self.attention_norm, rope, attention, segments)
        return self.mlp(x, self.mlp_norm, segments.live)


@partial(jax.jit, static_argnames=("graphdef", "attention"))
def _run_layer(
    graphdef: nnx.GraphDef[EncoderLayer],
    weights: nnx.State[Any, Any],
    x: Float[Array, "tokens embed"],
    rope: Angles | None,
    attention: SegmentAttention,
    segments: Segments,
) -> Float[Array, "tokens embed"]:
    """Run one layer; a separate function, so that it is traced and lowered once for all alike."""
    return nnx.merge(graphdef, weights)(x, rope, attention, segments)


class Encoder(nnx.Module):
    """Maps the token ids of packed texts to one vector per text."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        embed, table = config.hidden_size, Unquantized(quantization.dtype)
        self.pooling = config.pooling
        self.normalize = config.normalize
        self.embed = Embedding(config.vocab_size, embed, table, axis="vocab")
        if config.rope_theta is None:
            self.freqs = None
            self.position = Embedding(config.num_positions, embed, table)
        else:
            freqs = frequencies(config.head_dim, config.rope_theta, None)
            self.freqs = tuple(freqs.tolist())
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
        x, rope = self.embed(tokens), None
        if self.freqs is None:
            x = x + self.position(segments.positions)
        else:
            rope = angles(segments.positions, jnp.asarray(self.freqs, jnp.float32))
        x = self.embed_norm(x + self.token_type(jnp.zeros_like(tokens)))
        for layer in self.layers:
            x = _run_layer(*nnx.split(layer), x, rope, attention, segments)
        pooled = x[cu_seqlens[:-1]] if self.pooling == "cls" else segments.mean(x)
        if not self.normalize:
            return pooled
        norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled / jnp.maximum(norm, 1e-12)
