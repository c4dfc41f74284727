"""The bidirectional encoder that turns texts into embeddings (arXiv:1810.04805, 1908.10084)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from inferneo_jax.config import EncoderConfig
from inferneo_jax.layers.attention import BidirectionalAttention
from inferneo_jax.layers.linear import Embedding, Linear
from inferneo_jax.layers.matrix import Formats, MatrixFormat, Plain
from inferneo_jax.layers.norm import LayerNorm


class GeluMLP(nnx.Module):
    """``down(gelu(up(x)))`` with the exact, error-function GELU."""

    def __init__(self, config: EncoderConfig, format: MatrixFormat) -> None:
        embed, mlp = config.hidden_size, config.mlp_size
        self.up = Linear((embed, mlp), ("embed", "mlp"), format, bias=True)
        self.down = Linear((mlp, embed), ("mlp", "embed"), format, bias=True)

    def __call__(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens embed"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class EncoderLayer(nnx.Module):
    """Attention and feed-forward, each added to the residual stream and then normalised."""

    def __init__(self, config: EncoderConfig, formats: Formats) -> None:
        self.attention = BidirectionalAttention(config, formats.linear)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GeluMLP(config, formats.linear)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def __call__(
        self, x: Float[Array, "rows tokens embed"], live: Bool[Array, "rows tokens"]
    ) -> Float[Array, "rows tokens embed"]:
        x = self.attention_norm(x + self.attention(x, live))
        return self.mlp_norm(x + self.mlp(x))


@partial(jax.jit, static_argnames=("graphdef",))
def _run_layer(
    graphdef: nnx.GraphDef[EncoderLayer],
    weights: nnx.State[Any, Any],
    x: Float[Array, "rows tokens embed"],
    live: Bool[Array, "rows tokens"],
) -> Float[Array, "rows tokens embed"]:
    """One layer, as a function that is traced and lowered once for all layers."""
    return nnx.merge(graphdef, weights)(x, live)


class Encoder(nnx.Module):
    """Token ids of whole texts to one vector per text."""

    def __init__(self, config: EncoderConfig, formats: Formats) -> None:
        embed, plain = config.hidden_size, Plain(formats.dtype)
        self.pooling = config.pooling
        self.normalize = config.normalize
        self.embed = Embedding(config.vocab_size, embed, plain, axis="vocab")
        self.position = Embedding(config.num_positions, embed, plain)
        self.token_type = Embedding(config.num_token_types, embed, plain)
        self.embed_norm = LayerNorm(embed, config.norm_eps)
        self.layers = nnx.List([EncoderLayer(config, formats) for _ in range(config.num_layers)])

    def __call__(
        self, tokens: Int[Array, "rows tokens"], lengths: Int[Array, " rows"]
    ) -> Float[Array, "rows embed"]:
        """Embed each row's first ``length`` tokens; rows of length 0 give finite nonsense."""
        places = jnp.arange(tokens.shape[1])[None, :]
        live = places < jnp.maximum(lengths, 1)[:, None]
        x = self.embed(tokens) + self.position(places) + self.token_type(jnp.zeros_like(places))
        x = self.embed_norm(x)
        for layer in self.layers:
            x = _run_layer(*nnx.split(layer), x, live)
        if self.pooling == "cls":
            pooled = x[:, 0]
        else:
            kept = jnp.where(live[..., None], x, 0.0).sum(axis=1)
            pooled = kept / live.sum(axis=1, keepdims=True).astype(jnp.float32)
        if not self.normalize:
            return pooled
        norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled / jnp.maximum(norm, 1e-12)
