"""One law: whatever the mesh, outputs are those of one device.

The real model is compiled for two meshes, each time for a minute; ``ALL_MESHES=1`` takes all.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.engine.engine import Engine
from inferneo_jax.errors import ConfigError
from inferneo_jax.model import EmbeddingModel, LanguageModel, load_model
from inferneo_jax.sharding.padding import pad_for_mesh
from tests.support.paths import COMPILED
from tests.support.server_process import CHAT_MODEL, EMBEDDING_MODEL, process, stats_of
from tests.support.tiny_model import (
    MIXED,
    NATIVE,
    NATIVE_ENGINE,
    ONE_DEVICE,
    TINY,
    TINY_ENGINE,
    Collected,
    close,
    make_runner,
    prompt,
    submit,
    tiny_weights,
)

MESHES = [MeshShape(1, 2), MeshShape(1, 8), MeshShape(2, 4), MeshShape(8, 1)]
DIVIDING = DecoderConfig.from_dict(
    TINY.to_dict()
    | {"vocab_size": 104, "num_heads": 16, "num_kv_heads": 8, "tie_embeddings": False}
)
BIASED = DecoderConfig.from_dict(
    TINY.to_dict() | {"num_heads": 8, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True}
)
"""Two KV heads, each with a group of four that several devices share."""


def _engine(config: DecoderConfig, shape: MeshShape, engine: EngineConfig = TINY_ENGINE) -> Engine:
    sizes = dataclasses.replace(
        engine, slots=8, kv_tokens=640, prefill_chunks=(8,), row_buckets=(8,), mesh=shape
    )
    runner = make_runner(sizes, config)
    runner.compile()
    return Engine(runner)


def _outputs(engine: Engine) -> list[Collected]:
    """Requests of every kind, more than a rank has slots, some sharing a prefix."""
    first = [submit(engine, prompt(9 + i, seed=i // 2), **MIXED[i]) for i in range(len(MIXED))]
    again = [submit(engine, prompt(9, seed=i % 3), 20) for i in range(6)]
    return [collected.wait() for collected in first + again]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Collected]]:
    found = {}
    for name, config in {"dividing": DIVIDING, "ragged": TINY, "biased": BIASED}.items():
        engine = _engine(config, ONE_DEVICE)
        found[name] = _outputs(engine)
        engine.stop()
    return found


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("name", ["dividing", "ragged", "biased"])
def test_every_mesh_gives_what_one_device_gives(
    expected: dict[str, list[Collected]], name: str, shape: MeshShape
) -> None:
    engine = _engine({"dividing": DIVIDING, "ragged": TINY, "biased": BIASED}[name], shape)
    try:
        for got, wanted in zip(_outputs(engine), expected[name], strict=True):
            close(got, wanted)
        stats = engine.stats()
        assert (stats.slots, stats.slots_used, stats.pages_used) == (8, 0, 0)
        assert stats.compiles_after_ready == 0
    finally:
        engine.stop()


def test_native_kernels_run_on_each_devices_part() -> None:
    outputs = []
    for shape in (ONE_DEVICE, MeshShape(2, 4)):
        engine = _engine(dataclasses.replace(NATIVE, num_layers=1), shape, NATIVE_ENGINE)
        try:
            outputs.append(_outputs(engine))
        finally:
            engine.stop()
    for got, wanted in zip(*outputs, strict=True):
        close(got, wanted)


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


def _real(folder: Path, shape: MeshShape) -> LanguageModel:
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
    return model


def _stories(model: LanguageModel) -> list[Collected]:
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "2 + 2 ="]
    sent = [
        submit(model.engine, tuple(model.tokenizer.encode(text)), 8, logprobs=2, prompt_logprobs=0)
        for text in texts
    ]
    return [collected.wait() for collected in sent]


def test_a_real_model_is_the_same_on_every_mesh(real_checkpoints: Path) -> None:
    found = {}
    meshes = MESHES if os.environ.get("ALL_MESHES") else [MeshShape(1, 8), MeshShape(2, 4)]
    for shape in (ONE_DEVICE, *meshes):
        model = _real(real_checkpoints / CHAT_MODEL, shape)
        try:
            found[shape] = _stories(model)
        finally:
            model.stop()
    for shape in meshes:
        for got, wanted in zip(found[shape], found[ONE_DEVICE], strict=True):
            close(got, wanted)


@pytest.mark.parametrize("shape", [MeshShape(1, 8), MeshShape(2, 4)], ids=str)
def test_embeddings_are_the_same_on_every_mesh(
    real_checkpoints: Path, real_embedder: object, shape: MeshShape
) -> None:
    config = EngineConfig(
        dtype="float32",
        quantization="none",
        mesh=shape,
        max_len=32,
        compilation_cache=str(COMPILED),
    )
    model = load_model(real_checkpoints / EMBEDDING_MODEL, config, name=EMBEDDING_MODEL)
    assert isinstance(model, EmbeddingModel)
    texts = [[101, 2054, 102], [101, 2003, 2023, 1029, 102]] * 20
    try:
        got = model.embedder.embed(texts).result(timeout=120)
    finally:
        model.stop()
    wanted = real_embedder.embed(texts).result(timeout=120)  # type: ignore[attr-defined]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_server_on_a_mesh_answers_as_one_on_a_device(
    real_checkpoints: Path, address: str, tmp_path: Path
) -> None:
    settings = {
        "INFERNEO_CHECKPOINTS": str(real_checkpoints),
        "INFERNEO_MODELS": CHAT_MODEL,
        "INFERNEO_DTYPE": "float32",
        "INFERNEO_SLOTS": "4",
        "INFERNEO_MAX_LEN": "256",
        "INFERNEO_MESH": "data=2,model=2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    body = {
        "model": CHAT_MODEL,
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_tokens": 12,
        "temperature": 0,
    }

    def answer(where: str) -> str:
        got = httpx.post(f"http://{where}/v1/chat/completions", json=body, timeout=120)
        assert got.status_code == 200, got.text
        return str(got.json()["choices"][0]["message"]["content"])

    with process(tmp_path / "log", settings) as server:
        server.wait_ready()
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(answer, [server.address] * 4))
        stats = stats_of(server.address)
    assert got == [answer(address)] * 4
    assert (stats["slots"], stats["compiles_after_ready"]) == (4, 0)
