"""The two forward passes, and the flat names of their weights."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from inferneo_jax.config import DecoderConfig, ModelConfig
from inferneo_jax.layers.spec import WeightSpec
from inferneo_jax.models.decoder import Decoder
from inferneo_jax.models.encoder import Encoder

__all__ = ["WeightSpec", "declare", "skeleton"]


def _abstract(config: ModelConfig, dtype: jnp.dtype) -> nnx.Module:
    build = Decoder if isinstance(config, DecoderConfig) else Encoder
    return nnx.eval_shape(lambda: build(config, dtype))  # type: ignore[arg-type]


def declare(config: ModelConfig, dtype: jnp.dtype = jnp.dtype("float32")) -> dict[str, WeightSpec]:  # noqa: B008
    """Every weight of a model by its dotted name, in the order of its module's leaves.

    Args:
        config: of the model.
        dtype: of the matrices; norms and biases are float32 whatever it is.
    """
    state = nnx.state(_abstract(config, dtype))
    return {
        ".".join(str(part) for part in path): variable.get_metadata("spec")
        for path, variable in nnx.to_flat_state(state)
    }


def skeleton(
    config: ModelConfig, dtype: jnp.dtype
) -> tuple[nnx.GraphDef[Any], jax.tree_util.PyTreeDef]:
    """The module without its weights: what a jitted step needs to put them back.

    Inside the step, ``nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))`` costs nothing,
    since it happens while tracing; between steps the weights are a plain list of arrays, which
    jax flattens in microseconds.
    """
    graphdef, state = nnx.split(_abstract(config, dtype))
    return graphdef, jax.tree.structure(state)
