"""Every family's forward pass against transformers, on tiny random models."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EncoderConfig, EngineConfig, RopeScaling
from inferneo_jax.layers.cache import AttentionMetadata, PagedAttention
from inferneo_jax.layers.quantization import QuantizationConfig
from inferneo_jax.layers.rope import frequencies
from inferneo_jax.model import load_model
from inferneo_jax.models import REFERENCE
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.weights.checkpoint import open_weights, read_info
from inferneo_jax.weights.convert import convert
from inferneo_jax.weights.placement import place_weights
from tests.support.paths import GOLDEN
from tests.support.tiny_model import ONE_DEVICE, TINY, golden

CASES = {case["name"]: case for case in golden("families")}
F32 = jnp.dtype("float32")


def _load(folder: Path) -> tuple[DecoderConfig | EncoderConfig, nnx.Module]:
    config = read_info(folder).config
    shapes = {name: spec.shape for name, spec in models.weight_specs(config).items()}
    sources = open_weights(folder, shapes)
    weights = place_weights(sources, config, config, make_mesh(ONE_DEVICE), REFERENCE)
    graphdef, treedef = models.graphdef(config, REFERENCE)
    return config, nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in CASES:
        convert(GOLDEN / "families" / name, folder / name)
    return folder


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "logits" in case])
def test_decoder_families_equal_the_reference(converted: Path, name: str) -> None:
    config, model = _load(converted / name)
    assert isinstance(config, DecoderConfig)
    case = CASES[name]
    attention = PagedAttention(config.num_kv_heads, config.head_dim, 4, F32, block_len=8)
    tokens = jnp.asarray([case["ids"]], jnp.int32)
    metadata = AttentionMetadata(
        jnp.asarray([[3, 1, 5, 2, 6]], jnp.int32),
        jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :],
    )
    hidden, _ = model(tokens, attention, attention.init(config, 7), metadata)
    logits = np.asarray(model.logits(hidden[0]))
    # CPUs add up in different orders, which shows in proportion to a logit's size.
    rounding = 16 * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(logits[case["positions"]], case["logits"], atol=2e-5, rtol=rounding)


@pytest.mark.parametrize("kernels", ["xla", "auto"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "embeddings" in case])
def test_encoder_families_equal_the_reference(converted: Path, name: str, kernels: Any) -> None:
    case = CASES[name]
    config = EngineConfig(dtype="float32", kernels=kernels, mesh=ONE_DEVICE)
    model = load_model(converted / name, config, name=name)
    try:
        vectors = model.embedder.embed(case["ids"]).result(timeout=60)
        together = model.embedder.embed(case["ids"] * 60).result(timeout=60)
        alone = model.embedder.embed(case["ids"][1:2]).result(timeout=60)
    finally:
        model.stop()
    np.testing.assert_allclose(together, list(vectors) * 60, atol=1e-5)
    np.testing.assert_allclose(alone[0], vectors[1], atol=1e-5)
    np.testing.assert_allclose(vectors, case["embeddings"], atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "nomic-bert"])
def test_an_encoder_in_a_gguf_equals_the_reference(made: Any, tmp_path: Path, name: str) -> None:
    case, source = CASES[name], GOLDEN / "families" / name
    tensors = {n: a.astype(np.float32) for n, a in load_file(source / "model.safetensors").items()}
    vocab = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(vocab, key=vocab.__getitem__)
    info = json.loads((source / "config.json").read_text())
    file = made.encoder_gguf(tmp_path / "m.gguf", info, tensors, words)
    config = EngineConfig(dtype="float32", mesh=ONE_DEVICE)
    model = load_model(convert(file, tmp_path / "out"), config, name=name)
    try:
        texts = ["cat", "The big dog sat on a mat.", "reds! " * 9]
        assert model.tokenizer.encode_batch(texts) == case["ids"]
        vectors = model.embedder.embed(case["ids"]).result(timeout=60)
    finally:
        model.stop()
    np.testing.assert_allclose(vectors, case["embeddings"], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"qkv_bias": True, "qk_norm": True}, {"num_layers": 12}],
)
def test_declared_names_follow_the_order_of_the_leaves(changes: dict[str, object]) -> None:
    config = DecoderConfig.from_dict(TINY.to_dict() | changes)
    declared = models.weight_specs(config)
    graphdef, treedef = models.graphdef(config, REFERENCE)
    leaves = [jnp.full(spec.flat_shape, i) for i, spec in enumerate(declared.values())]
    model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
    for i, name in enumerate(declared):
        value: object = model
        for part in name.split("."):
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        assert jax.tree.leaves(value.get_value())[0].reshape(-1)[0] == i


def test_weights_are_matrices_in_the_wanted_dtype_and_the_rest_float32() -> None:
    specs = models.weight_specs(TINY, QuantizationConfig.unquantized("bfloat16"))
    for spec in specs.values():
        (parameter,) = spec.parameters
        assert parameter.dtype == ("bfloat16" if len(spec.shape) > 1 else "float32")


def test_llama3_scaling_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, scaled = (frequencies(128, 500_000.0, s) for s in (None, scaling))
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert (np.diff(ratio) >= -1e-5).all()


def test_attention_reads_its_own_pages_only() -> None:
    attention = PagedAttention(1, 4, 2, F32, block_len=4)
    rng = np.random.default_rng(0)
    layer = attention.init(DecoderConfig.from_dict(TINY.to_dict() | {"num_layers": 1}), 9)[0]
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    keys, values = draw(1, 5, 1, 4), draw(1, 5, 1, 4)
    metadata = AttentionMetadata(
        jnp.asarray([[8, 2, 5, 0]], jnp.int32), jnp.arange(5, dtype=jnp.int32)[None, :]
    )
    layer = attention.write(layer, keys, values, metadata)
    queries = draw(1, 5, 1, 3, 4)
    got = attention.attend(queries, layer, metadata)

    scores = jnp.einsum("tgd,pd->tgp", queries[0, :, 0], keys[0, :, 0]) / 2
    causal = jnp.tril(jnp.ones((5, 5), bool))[:, None, :]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("tgp,pd->tgd", weights, values[0, :, 0])
    np.testing.assert_allclose(got[0, :, 0], expected, atol=1e-6)

    spoiled = layer._replace(keys=layer.keys.at[jnp.array([1, 3, 4, 6, 7])].set(1e4))
    np.testing.assert_array_equal(attention.attend(queries, spoiled, metadata), got)
