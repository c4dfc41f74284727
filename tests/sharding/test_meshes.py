"""One law: whatever the mesh, outputs are those of one device.

``ALL_MESHES=1`` tries every model on every mesh, and compiles for minutes.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.engine.embedder import Embedder, Vectors
from inferneo_jax.engine.served import EmbeddingModel, LanguageModel
from inferneo_jax.errors import ConfigError
from inferneo_jax.model import load_model
from inferneo_jax.sharding.padding import pad_for_mesh
from inferneo_jax.weights.convert import convert
from tests.support.paths import COMPILED, FAMILIES
from tests.support.server_process import CHAT_MODEL, EMBEDDING_MODEL
from tests.support.tiny_model import (
    EIGHT_SLOTS,
    MIXED,
    NATIVE,
    ONE_DEVICE,
    TINY,
    TINY_ENGINE,
    Collected,
    close_all,
    make_runner,
    prompt,
    running_engine,
    submit,
    tiny_weights,
)

ALL_MESHES = bool(os.environ.get("ALL_MESHES"))
MESHES = [MeshShape(1, 2), MeshShape(1, 8), MeshShape(2, 4), MeshShape(8, 1)]
DIVIDING = DecoderConfig.from_dict(
    TINY.to_dict()
    | {"vocab_size": 104, "num_heads": 16, "num_kv_heads": 8, "tie_embeddings": False}
)
BIASED = DecoderConfig.from_dict(
    TINY.to_dict() | {"num_heads": 8, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True}
)
"""Two KV heads, each with a group of four that several devices share."""


MODELS = {"dividing": DIVIDING, "ragged": TINY, "biased": BIASED}
SPLIT = [MeshShape(1, 8), MeshShape(2, 4)]
"""Where heads and tables do not divide as they do on one device."""
CASES = [
    pytest.param(name, shape, id=f"{name}-{shape}")
    for name in MODELS
    for shape in (MESHES if name == "dividing" or ALL_MESHES else SPLIT)
]


def _outputs(
    config: DecoderConfig, shape: MeshShape, engine: EngineConfig = EIGHT_SLOTS
) -> list[Collected]:
    """Of requests of every kind, more than a rank has slots, some sharing a prefix."""
    with running_engine(dataclasses.replace(engine, mesh=shape), config) as made:
        sent = [submit(made, prompt(9 + i, seed=i // 2), **MIXED[i]) for i in range(len(MIXED))]
        sent += [submit(made, prompt(9, seed=i % 3), 20) for i in range(6)]
        return [collected.wait() for collected in sent]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Collected]]:
    return {name: _outputs(config, ONE_DEVICE) for name, config in MODELS.items()}


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_mesh_gives_what_one_device_gives(
    expected: dict[str, list[Collected]], name: str, shape: MeshShape
) -> None:
    close_all(_outputs(MODELS[name], shape), expected[name])


def test_native_kernels_run_on_each_devices_part() -> None:
    model = dataclasses.replace(NATIVE, num_layers=1)
    engine = dataclasses.replace(EIGHT_SLOTS, page_len=16, kernels="native", dtype="float32")
    one, split = (_outputs(model, shape, engine) for shape in (ONE_DEVICE, MeshShape(2, 4)))
    close_all(split, one)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("config", [TINY, DIVIDING, BIASED])
def test_a_fitted_model_divides_and_holds_every_head(config: DecoderConfig, parts: int) -> None:
    padded = pad_for_mesh(config, parts)
    assert padded.num_kv_heads % parts == padded.vocab_size % parts == padded.mlp_size % parts == 0
    assert padded.num_heads >= config.num_heads
    assert padded.vocab_size - config.vocab_size < parts
    if not config.num_kv_heads % parts:
        assert (padded.num_heads, padded.num_kv_heads) == (config.num_heads, config.num_kv_heads)


def test_no_device_holds_more_than_its_part() -> None:
    whole = models.weight_specs(DIVIDING)
    for array, spec in zip(tiny_weights(DIVIDING, MeshShape(1, 8)), whole.values(), strict=True):
        split = any(axis in ("vocab", "kv_heads", "mlp") for axis in spec.axes)
        for shard in array.addressable_shards:
            assert shard.data.size * (8 if split else 1) == array.size


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=2,model=4", MeshShape(2, 4)),
        ("model=8", MeshShape(1, 8)),
        ("data=2", MeshShape(2)),
        ("", MeshShape()),
    ],
)
def test_a_mesh_is_read_from_text(text: str, shape: MeshShape) -> None:
    assert MeshShape.parse(text) == shape


@pytest.mark.parametrize("text", ["8", "model", "model=x", "model=0", "rows=2", "data=1,data=2"])
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="mesh"):
        MeshShape.parse(text)


def test_a_mesh_takes_all_devices_or_says_how_many_it_needs() -> None:
    assert MeshShape().over(8) == (1, 8)
    assert MeshShape(2).over(8) == (2, 4)
    with pytest.raises(ConfigError, match="needs 16 devices and there are 8"):
        MeshShape(4, 4).over(8)
    with pytest.raises(ConfigError, match="does not divide the 8 devices"):
        MeshShape(3).over(8)


def test_groups_must_divide_the_slots() -> None:
    with pytest.raises(ConfigError, match="slots is 4; it must be a multiple of data=8"):
        make_runner(dataclasses.replace(TINY_ENGINE, mesh=MeshShape(8, 1)))


def _stories(folder: Path, shape: MeshShape) -> list[Collected]:
    config = EngineConfig(
        slots=8,
        max_len=128,
        kv_tokens=1024,
        prefill_chunks=(32,),
        dtype="float32",
        quantization="none",
        row_buckets=(8,),
        speculation="off",
        mesh=shape,
        compilation_cache=str(COMPILED),
    )
    model = load_model(folder, config, name=CHAT_MODEL)
    assert isinstance(model, LanguageModel)
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "2 + 2 ="]
    fields = {"logprobs": 2, "prompt_logprobs": 0}
    try:
        ids = [tuple(model.tokenizer.encode(text)) for text in texts]
        return [each.wait() for each in [submit(model.engine, i, 8, **fields) for i in ids]]
    finally:
        model.stop()


def test_a_real_model_is_the_same_on_every_mesh(real_checkpoints: Path) -> None:
    wanted = _stories(real_checkpoints / CHAT_MODEL, ONE_DEVICE)
    for shape in MESHES if ALL_MESHES else [MeshShape(2, 4)]:
        close_all(_stories(real_checkpoints / CHAT_MODEL, shape), wanted)


def _vectors(folder: Path, shape: MeshShape, texts: list[list[int]]) -> Vectors:
    config = EngineConfig(
        dtype="float32",
        quantization="none",
        mesh=shape,
        max_len=32,
        compilation_cache=str(COMPILED),
    )
    model = load_model(folder, config, name=folder.name)
    assert isinstance(model, EmbeddingModel)
    try:
        return model.embedder.embed(texts).result(timeout=120)
    finally:
        model.stop()


def test_embeddings_are_the_same_on_every_mesh(
    real_checkpoints: Path, real_embedder: Embedder
) -> None:
    texts = [[101, 2054, 102], [101, 2003, 2023, 1029, 102]] * 20
    wanted = real_embedder.embed(texts).result(timeout=120)
    for shape in SPLIT if ALL_MESHES else [MeshShape(2, 4)]:
        got = _vectors(real_checkpoints / EMBEDDING_MODEL, shape, texts)
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_rotary_embeddings_are_the_same_on_every_mesh(tmp_path: Path) -> None:
    folder = convert(FAMILIES / "nomic-bert", tmp_path / "nomic-bert")
    texts = [[2, 4, 13, 3], [2, 7, 3], [2, *range(4, 30), 3]] * 7
    wanted = _vectors(folder, ONE_DEVICE, texts)
    for shape in SPLIT:  # among eight devices, four heads are padded
        np.testing.assert_allclose(_vectors(folder, shape, texts), wanted, atol=1e-5)
