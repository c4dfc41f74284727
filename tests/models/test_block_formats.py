"""Whole decoders whose matrices are multiplied in the formats that a GGUF has them in."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf.constants import GGMLQuantizationType as Kind
from jaxtyping import Array, Float

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.engine.engine import Engine
from inferneo_jax.kernels.cpu.build import library
from inferneo_jax.kernels.cpu.linear import FORMATS
from inferneo_jax.layers.cache import AttentionMetadata
from inferneo_jax.layers.quantization import QuantizationConfig, Stored, Unquantized
from inferneo_jax.model import load_weights
from inferneo_jax.runner.backends import DecoderBackend, resolve_decoder
from inferneo_jax.runner.model_info import ModelInfo
from inferneo_jax.runner.runner import Runner
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.weights.convert import read_model
from inferneo_jax.weights.sources.weight import Weight, block_formats
from tests.support.model_files import LLAMA, TOKENS, random_tensors, write_gguf
from tests.support.tiny_model import GREEDY, ONE_DEVICE, compiled, submit
from tests.support.weights import ArrayWeight

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

CONFIG = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
ENGINE = EngineConfig(
    slots=8,
    max_len=64,
    page_len=16,
    kv_tokens=512,
    row_buckets=(8,),
    prefill_chunks=(16,),
    kv_dtype="float32",
    speculation="off",
    mesh=ONE_DEVICE,
)
MIXED = {
    "lm_head": Kind.Q6_K,
    "layers.0.self_attn.v": Kind.Q6_K,
    "layers.0.mlp.down": Kind.Q6_K,
    "layers.1.self_attn": Kind.Q5_0,
    "layers.1.mlp": Kind.Q8_0,
}
"""As in a file of Q4_K_M: parts of names, and the format of these tensors."""
F32 = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Rounded(Unquantized):
    """The reference with rows that are rounded as the kernels round them: to int8 by 32 values."""

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        spans = x.reshape(x.shape[0], -1, 32)
        scales = jnp.maximum(jnp.abs(spans).max(axis=2, keepdims=True), 1e-30) / 127
        return super().product(
            (jnp.round(spans / scales) * scales).reshape(x.shape), stored, table=table
        )


def opened(
    folder: Path, kind: Kind, exceptions: Mapping[str, Kind] | None = None, **config: Any
) -> tuple[DecoderConfig, Mapping[str, Weight]]:
    """A small model whose matrices are of a format, from a file."""
    made = CONFIG | config
    tensors = {
        name: array if array.ndim == 1 else array / np.sqrt(array.shape[1])
        for name, array in random_tensors(made).items()
    }
    model = read_model(
        write_gguf(folder / "model.gguf", made, tensors, kind, exceptions=exceptions or {})
    )
    assert isinstance(model.config, DecoderConfig)
    return model.config, model.weights


def resolved(
    model: DecoderConfig, stored: Mapping[str, Weight], config: EngineConfig = ENGINE
) -> DecoderBackend:
    return resolve_decoder(model, config, make_mesh(config.mesh), block_formats(stored))


def logits(backend: DecoderBackend, stored: Mapping[str, Weight]) -> np.ndarray:
    """Of a prompt's tokens, ``[tokens, vocabulary]``."""
    weights = load_weights(stored, backend)
    graphdef, treedef = models.graphdef(backend.padded, backend.quantization)
    metadata = AttentionMetadata(
        jnp.asarray([[2, 1]], jnp.int32), jnp.arange(24, dtype=jnp.int32)[None]
    )

    @jax.jit
    def run(weights: list[jax.Array], tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))
        cache = backend.attention.init(backend.padded, 3)
        hidden, _ = model(tokens, backend.attention, cache, metadata)
        return model.logits(hidden[0])

    tokens = np.random.default_rng(1).integers(3, len(TOKENS), (1, 24))
    return np.asarray(run(weights, jnp.asarray(tokens, jnp.int32)))


def rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(error))))


@pytest.mark.parametrize("kind", [*(Kind[name.upper()] for name in FORMATS), "mixed"])
def test_logits_differ_from_the_reference_as_rounded_rows_do(
    tmp_path: Path, kind: Kind | str
) -> None:
    model, stored = (
        opened(tmp_path, Kind.Q4_K, MIXED) if kind == "mixed" else opened(tmp_path, kind)
    )
    native = resolved(model, stored)
    assert set(ModelInfo.of(native, ()).quantization.split("+")) == (
        {"q4_k", "q5_0", "q6_k", "q8_0"} if kind == "mixed" else {kind.name.lower()}
    )
    reference = resolved(model, stored, dataclasses.replace(ENGINE, kernels="xla", dtype="float32"))
    method = Rounded(F32)
    rounded = dataclasses.replace(reference, quantization=QuantizationConfig(method, method))
    exact, expected, found = (logits(each, stored) for each in (reference, rounded, native))
    # The first two multiply what the gguf library dequantizes. Kernels and the second round rows
    # alike, so they give the same numbers, but for values that sums in another order round to a
    # neighbour: fewer than if they rounded independently, which would be a factor of 1.4.
    assert rms(found - expected) < 0.7 * rms(expected - exact)
    assert rms(found - exact) < 1.1 * rms(expected - exact)
    assert rms(expected - exact) < 0.1 * rms(exact)


@pytest.mark.parametrize("changes", [{"kernels": "xla"}, {"mesh": MeshShape(1, 2)}])
def test_elsewhere_blocks_are_dequantized(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, stored = opened(tmp_path, Kind.Q4_K, MIXED)
    backend = resolved(model, stored, dataclasses.replace(ENGINE, dtype="float32", **changes))
    assert backend.quantization == QuantizationConfig.unquantized("float32")
    floats = {name: ArrayWeight(weight[...]) for name, weight in stored.items()}
    for placed, expected in zip(
        load_weights(stored, backend), load_weights(floats, backend), strict=True
    ):
        np.testing.assert_array_equal(placed, expected)


def test_formats_without_a_kernel_are_rounded_to_eight_bits(tmp_path: Path) -> None:
    model, stored = opened(tmp_path, Kind.Q4_K, {"layers.0.self_attn.v": Kind.IQ3_S})
    backend = resolved(model, stored)
    specs = models.weight_specs(model, backend.quantization)
    assert specs["layers.0.attention.qkv.kernel"].method.name == "q8_0"
    assert specs["layers.1.attention.qkv.kernel"].method.name == "q4_k"
    exact = resolved(model, stored, dataclasses.replace(ENGINE, kernels="xla", dtype="float32"))
    difference = logits(backend, stored) - logits(exact, stored)
    assert rms(difference) < 0.03 * rms(logits(exact, stored))


def test_alone_is_batched_and_chunked_is_whole_in_mixed_formats(tmp_path: Path) -> None:
    model, stored = opened(tmp_path, Kind.Q4_K, MIXED)
    backend = resolved(model, stored)
    weights = load_weights(stored, backend)
    found = []
    prompts = [
        tuple(np.random.default_rng(length).integers(3, len(TOKENS), length).tolist())
        for length in (5, 9, 17, 24, 30, 31)
    ]
    for chunks, together in (((32,), False), ((32,), True), ((4, 8), True)):
        config = dataclasses.replace(ENGINE, prefill_chunks=chunks)
        runner = Runner(backend, config)
        runner.place(weights)
        engine = Engine(compiled(runner))
        try:
            runs = []
            for each in prompts:
                runs.append(submit(engine, each, sampling=GREEDY, logprobs=3, prompt_logprobs=0))
                if not together:
                    runs[-1].wait()
            found.append(
                [
                    (run.tokens, run.logprobs, run.outputs[-1].prompt_logprobs)
                    for run in (each.wait() for each in runs)
                ]
            )
        finally:
            engine.stop()
    assert found[0] == found[1]
    assert found[1] == found[2]
