"""From a checkpoint folder to a model that serves: weights, compiled steps, tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from inferneo_jax import compiles, models
from inferneo_jax.config import (
    DecoderConfig,
    EncoderConfig,
    EngineConfig,
    MeshShape,
    ModelConfig,
)
from inferneo_jax.embedder import Embedder
from inferneo_jax.engine import Engine
from inferneo_jax.executables import Progress
from inferneo_jax.layers.matrix import Formats
from inferneo_jax.memory import explained, require
from inferneo_jax.mesh import make_mesh
from inferneo_jax.numerics import dtype_for, formats_for
from inferneo_jax.runner import Runner, sharing
from inferneo_jax.tokenizer import Tokenizer
from inferneo_jax.weights.checkpoint import open_weights, read_info
from inferneo_jax.weights.placement import flat, local_bytes, place_weights, weight_shapes


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal model, ready to generate. ``max_len`` is prompt and output, in tokens."""

    name: str
    created: int
    tokenizer: Tokenizer
    engine: Engine
    max_len: int
    kind: Literal["decoder"] = "decoder"

    def stop(self) -> None:
        """End all its requests and its thread."""
        self.engine.stop()


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel:
    """An encoder, ready to embed. ``max_tokens`` is of one input, special tokens included."""

    name: str
    created: int
    tokenizer: Tokenizer
    embedder: Embedder
    max_tokens: int
    kind: Literal["encoder"] = "encoder"

    def stop(self) -> None:
        """End all its requests and its thread."""
        self.embedder.stop()


def load_model(
    path: Path, config: EngineConfig, *, name: str, progress: Progress | None = None
) -> LanguageModel | EmbeddingModel:
    """Load a converted checkpoint and compile all its steps. Blocks, for seconds to minutes.

    Raises:
        CheckpointError: the folder holds no usable model.
        ConfigError: the model does not fit the configuration.
    """
    info = read_info(path)
    tokenizer = Tokenizer.from_directory(path)
    with compiles.expected():
        if isinstance(info.config, EncoderConfig):
            # A small model: where there are several hosts, the devices of this one are plenty.
            shape = config.mesh if jax.process_count() == 1 else MeshShape()
            mesh = make_mesh(shape, jax.local_devices())
            formats = Formats.plain(dtype_for(config, mesh.devices.flat[0]))
            weights = _load_weights(path, info.config, mesh, formats)
            embedder = Embedder(
                info.config,
                weights,
                formats,
                mesh,
                config.max_len,
                config.step_seconds,
                config.compilation_cache,
            )
            with explained("the batches were compiled and first run"):
                embedder.start(progress)
            return EmbeddingModel(
                name=name,
                created=info.created,
                tokenizer=tokenizer,
                embedder=embedder,
                max_tokens=embedder.max_tokens,
            )
        assert isinstance(info.config, DecoderConfig)
        mesh = make_mesh(config.mesh)
        formats = formats_for(config, mesh)
        weights = _load_weights(path, info.config, mesh, formats)
        runner = Runner(info.config, weights, config, formats, mesh)
        with explained("the steps were compiled and first run"):
            runner.compile(progress)
    return LanguageModel(
        name=name,
        created=info.created,
        tokenizer=tokenizer,
        engine=Engine(runner),
        max_len=runner.max_len,
    )


def _load_weights(path: Path, config: ModelConfig, mesh: Mesh, formats: Formats) -> list[jax.Array]:
    needed = local_bytes(flat(weight_shapes(config, mesh, formats)))
    require(needed * sharing(mesh), "the weights")
    shapes = {name: spec.shape for name, spec in models.declare(config).items()}
    with explained("the weights were loaded"):
        return place_weights(open_weights(path, shapes), config, mesh, formats)
