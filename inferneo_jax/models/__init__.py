"""The two forward passes, and the specifications of their weights."""

from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from inferneo_jax.config import DecoderConfig, ModelConfig
from inferneo_jax.layers.quantization import QuantizationConfig
from inferneo_jax.layers.spec import WeightSpec
from inferneo_jax.models.decoder import Decoder
from inferneo_jax.models.encoder import Encoder

__all__ = ["REFERENCE", "WeightSpec", "graphdef", "weight_specs"]

REFERENCE = QuantizationConfig.unquantized("float32")
"""The reference numerics."""


@lru_cache(maxsize=16)
def _abstract(
    config: ModelConfig, quantization: QuantizationConfig
) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """A model's module, split into its graph definition and a state of shapes without values.

    Cached: building a module of many layers takes 0.1 s, and a start asks about twenty times.
    """
    build = Decoder if isinstance(config, DecoderConfig) else Encoder
    graphdefs = []

    def make() -> nnx.State[Any, Any]:
        graphdef, state = nnx.split(build(config, quantization))  # type: ignore[arg-type]
        graphdefs.append(graphdef)
        return state

    # Not nnx.eval_shape, which under a mesh would shard what is kept in several arrays.
    state = jax.eval_shape(make)
    return graphdefs[0], state


def weight_specs(
    config: ModelConfig, quantization: QuantizationConfig = REFERENCE
) -> dict[str, WeightSpec]:
    """The specification of each weight of a model by its dotted name, in the order of leaves.

    Args:
        config: of the model.
        quantization: of its matrices; norms and biases are float32 with any.
    """
    _, state = _abstract(config, quantization)
    return {
        ".".join(str(part) for part in path): variable.get_metadata("spec")
        for path, variable in nnx.to_flat_state(state)
    }


def graphdef(
    config: ModelConfig, quantization: QuantizationConfig
) -> tuple[nnx.GraphDef[Any], jax.tree_util.PyTreeDef]:
    """A model's graph definition and tree structure, from which a jitted step rebuilds it.

    Between steps the weights are a plain list of arrays, which jax flattens in microseconds. Inside
    a step, ``nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))`` happens while tracing, so
    it costs nothing at run time.
    """
    graphdef, state = _abstract(config, quantization)
    return graphdef, jax.tree.structure(state)
