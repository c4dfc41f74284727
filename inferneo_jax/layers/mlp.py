"""Feed-forward blocks and their activations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from inferneo_jax.layers.linear import Linear
from inferneo_jax.layers.norm import RMSNorm
from inferneo_jax.layers.quantization import QuantizationConfig


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202); gate and up share one kernel."""

    def __init__(self, embed: int, mlp: int, quantization: QuantizationConfig) -> None:
        self.num_gates = mlp
        self.gate_up = Linear(
            (embed, 2, mlp), ("embed", None, "mlp"), quantization.of("gate_up.kernel")
        )
        self.down = Linear((mlp, embed), ("mlp", "embed"), quantization.of("down.kernel"))

    def __call__(
        self, x: Float[Array, "rows tokens embed"], norm: RMSNorm
    ) -> Float[Array, "rows tokens embed"]:
        """``x + mlp(norm(x))``."""
        gate_up, down = self.gate_up.kernel.get_value(), self.down.kernel.get_value()
        rows = x.reshape(-1, x.shape[-1])
        fused = self.gate_up.method.feed_forward(
            rows, norm, gate_up, down, self.down.method, self.num_gates
        )
        if fused is not None:
            return fused.reshape(x.shape)
        both = self.gate_up(x, prologue=norm)
        return self.down(both.reshape(*x.shape[:-1], -1), prologue=gate, residual=x)


def gate(both: Float[Array, "*rows both"]) -> Float[Array, "*rows half"]:
    """``silu(gate) * up`` of rows that hold the gate and then ``up``."""
    gates, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gates) * up


def gelu(x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
    """The exact GELU, computed with the error function (arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)
