"""Self-attention blocks: causal over the paged cache, and bidirectional within each segment."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from inferneo_jax.config import DecoderConfig, EncoderConfig
from inferneo_jax.layers.cache import AttentionMetadata, LayerCache, MixedMetadata, PagedAttention
from inferneo_jax.layers.linear import Linear
from inferneo_jax.layers.norm import LayerNorm, RMSNorm
from inferneo_jax.layers.quantization import QuantizationConfig
from inferneo_jax.layers.rope import rotate
from inferneo_jax.layers.segments import SegmentAttention, Segments


class CausalAttention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions over a paged KV cache.

    Queries, keys and values come from one kernel ``[embed, kv_heads, group + 2, head_dim]``: for
    each KV head its group of query heads, then its key, then its value. Split by KV head, every
    part holds all that its heads need.
    """

    def __init__(self, config: DecoderConfig, quantization: QuantizationConfig) -> None:
        kv_heads, group, head_dim = config.num_kv_heads, config.group_size, config.head_dim
        self.qkv = Linear(
            (config.hidden_size, kv_heads, group + 2, head_dim),
            ("embed", "kv_heads", None, None),
            quantization.of("qkv.kernel"),
            bias=config.qkv_bias,
        )
        self.out = Linear(
            (kv_heads, group, head_dim, config.hidden_size),
            ("kv_heads", None, None, "embed"),
            quantization.of("out.kernel"),
            inputs=3,
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.norm_eps, axis=None)
            self.k_norm = RMSNorm(head_dim, config.norm_eps, axis=None)

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        norm: RMSNorm,
        rope: tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]],
        attention: PagedAttention,
        cache: LayerCache,
        metadata: AttentionMetadata | MixedMetadata,
    ) -> tuple[Float[Array, "rows tokens embed"], LayerCache]:
        """``x`` and what ``norm(x)`` finds in the context."""
        fused = self.qkv(x, prologue=norm)
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(fused[..., :-2, :]), self.k_norm(fused[..., -2:-1, :])
            fused = jnp.concatenate([queries, keys, fused[..., -1:, :]], axis=-2)
        mixed, cache = attention.run(fused, rope, cache, metadata)
        return self.out(mixed, residual=x), cache


class BidirectionalAttention(nnx.Module):
    """Every token attends to all tokens of its segment (arXiv:1706.03762)."""

    def __init__(self, config: EncoderConfig, quantization: QuantizationConfig) -> None:
        embed, heads, head_dim = config.hidden_size, config.num_heads, config.head_dim
        self.qkv = Linear(
            (embed, 3, heads, head_dim),
            ("embed", None, "heads", None),
            quantization.of("qkv.kernel"),
            bias=config.biases,
        )
        self.out = Linear(
            (heads, head_dim, embed),
            ("heads", None, "embed"),
            quantization.of("out.kernel"),
            inputs=2,
            bias=config.biases,
        )

    def __call__(
        self,
        x: Float[Array, "tokens embed"],
        norm: LayerNorm,
        rope: tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]] | None,
        attention: SegmentAttention,
        segments: Segments,
    ) -> Float[Array, "tokens embed"]:
        """``norm`` of ``x`` and what it finds in its segment."""
        fused = self.qkv(x, narrow=rope is None, live=segments.live)
        if rope is not None:
            rotated = rotate(fused[:, :2], *rope)
            # Rounded once, after the rotation.
            fused = jnp.concatenate([rotated, fused[:, 2:]], axis=1).astype(self.qkv.method.dtype)
        mixed = attention.attend(fused, segments)
        return self.out(mixed, residual=x, transform=norm, live=segments.live)
