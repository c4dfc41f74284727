"""The two forward passes, and the flat names of their weights."""

from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from inferneo_jax.config import DecoderConfig, ModelConfig
from inferneo_jax.layers.quantization import Formats
from inferneo_jax.layers.spec import WeightSpec
from inferneo_jax.models.decoder import Decoder
from inferneo_jax.models.encoder import Encoder

__all__ = ["WeightSpec", "declare", "skeleton"]


REFERENCE = Formats.plain("float32")


@lru_cache(maxsize=16)
def _abstract(
    config: ModelConfig, formats: Formats
) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """The module in two, without a value anywhere.

    Kept: modules of many layers take a tenth of a second, and a start asks some twenty times.
    """
    build = Decoder if isinstance(config, DecoderConfig) else Encoder
    graphdefs = []

    def make() -> nnx.State[Any, Any]:
        graphdef, state = nnx.split(build(config, formats))  # type: ignore[arg-type]
        graphdefs.append(graphdef)
        return state

    # Not nnx.eval_shape, which under a mesh would shard what is kept in several arrays.
    state = jax.eval_shape(make)
    return graphdefs[0], state


def declare(config: ModelConfig, formats: Formats = REFERENCE) -> dict[str, WeightSpec]:
    """Every weight of a model by its dotted name, in the order of its module's leaves.

    Args:
        config: of the model.
        formats: of its matrices; norms and biases are float32 whatever these are.
    """
    _, state = _abstract(config, formats)
    return {
        ".".join(str(part) for part in path): variable.get_metadata("spec")
        for path, variable in nnx.to_flat_state(state)
    }


def skeleton(
    config: ModelConfig, formats: Formats
) -> tuple[nnx.GraphDef[Any], jax.tree_util.PyTreeDef]:
    """The module without its weights: what a jitted step needs to put them back.

    Inside the step, ``nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))`` costs nothing,
    since it happens while tracing; between steps the weights are a plain list of arrays, which
    jax flattens in microseconds.
    """
    graphdef, state = _abstract(config, formats)
    return graphdef, jax.tree.structure(state)
