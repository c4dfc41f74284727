"""Feed-forward blocks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from inferneo_jax.layers.linear import Linear


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202); gate and up are one kernel."""

    def __init__(self, embed: int, mlp: int, dtype: jnp.dtype) -> None:
        self.gate_up = Linear((embed, 2, mlp), ("embed", None, "mlp"), dtype)
        self.down = Linear((mlp, embed), ("mlp", "embed"), dtype)

    def __call__(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens embed"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-2)
        hidden = (jax.nn.silu(gate) * up).squeeze(-2)
        return self.down(hidden)
