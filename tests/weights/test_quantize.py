"""Conversions that quantize."""

import gguf
import numpy as np
import pytest

from inferneo_jax.errors import CheckpointError, ConfigError
from inferneo_jax.layers.quantization import Int8
from inferneo_jax.models import weight_specs
from inferneo_jax.models.families import find_family
from inferneo_jax.weights.checkpoint import fingerprint, open_weights, read_info, stored_shapes
from inferneo_jax.weights.convert import convert, read_model
from inferneo_jax.weights.kquants import encode_kquants
from inferneo_jax.weights.quantize import QUANTIZATIONS
from tests.support.weights import joined

Q = gguf.GGMLQuantizationType
BLOCKS = [name for name in QUANTIZATIONS if name not in ("none", "int8")]


def opened(path):
    shapes = {name: spec.shape for name, spec in weight_specs(read_info(path).config).items()}
    return open_weights(path, shapes)


def through(format, array):
    """The numbers that an array stands for once it is quantized."""
    if format == "int8":
        values, scales = Int8(np.dtype("float32")).encode(array.T, table=False)
        return values * scales.T
    kind = Q[format.upper()]
    return gguf.quants.dequantize(encoded(format, array), kind)


def encoded(format, array):
    if format.endswith("_k"):
        return encode_kquants(format, array)
    return gguf.quants.quantize(array, Q[format.upper()])


def format_of(name, quantization, tied):
    if quantization == "none" or "norm" in name:
        return None
    fine = "q6_k" if quantization.endswith("_k") else "q8_0"
    if "embed_tokens" in name:
        return fine if quantization != "int8" else "int8" if tied else None
    if "lm_head" in name:
        return "int8" if quantization == "int8" else fine
    return quantization


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantized_weights_are_those_of_the_reference(made, tmp_path, quantization, tied):
    wide = {"hidden_size": 256, "intermediate_size": 512} if quantization.endswith("_k") else {}
    config = made.LLAMA | wide | {"tie_word_embeddings": tied}
    tensors = made.tensors(config)
    source = made.folder(tmp_path / "hf", config, tensors)
    reports = []
    path = convert(
        source,
        tmp_path / "out",
        lambda *report: reports.append(report),
        quantization=quantization,
    )
    family = find_family(config)
    rounded = {}
    for name, array in tensors.items():
        format = format_of(name, quantization, tied)
        rounded[name] = through(format, array) if format else array
    mappings = family.weight_map(family.read_config(config))
    wanted = {n: joined(m, *[rounded[t.name] for t in m.tensors]) for n, m in mappings.items()}
    weights = opened(path)
    assert weights.keys() == wanted.keys()
    for name, whole in wanted.items():
        np.testing.assert_allclose(weights[name][...], whole, rtol=1e-6, err_msg=name)
        part = tuple(slice(size // 3, None) for size in whole.shape)
        np.testing.assert_allclose(weights[name][part], whole[part], rtol=1e-6, err_msg=name)
    total = sum(array.nbytes for array in tensors.values())
    assert reports[0] == ("quantizing", 0, total)
    assert reports[-1] == ("quantizing", total, total)
    assert stored_shapes(read_info(path)) == {name: a.shape for name, a in tensors.items()}


@pytest.mark.parametrize("quantization", BLOCKS)
def test_blocks_are_kept_as_they_are(made, tmp_path, quantization):
    config = made.LLAMA | {"hidden_size": 256, "intermediate_size": 512}
    tensors = made.tensors(config)
    path = convert(
        made.folder(tmp_path / "hf", config, tensors), tmp_path / "out", quantization=quantization
    )
    weight = opened(path)["layers.1.mlp.down.kernel"]
    ((part, (rows,)),) = weight.blocks()
    assert part == (quantization, ((0, 256),))
    array = tensors["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(rows, encoded(quantization, array))
    assert opened(path)["head.kernel"].parts[0].format == format_of("lm_head", quantization, False)


def test_a_checkpoint_of_int8_gives_the_method_its_own_numbers(made, tmp_path):
    path = convert(made.folder(tmp_path / "hf", made.LLAMA), tmp_path / "out", quantization="int8")
    direct = read_model(tmp_path / "hf").weights["layers.0.mlp.down.kernel"][...]
    method = Int8(np.dtype("float32"))
    values, scales = method.encode(direct, table=False)
    again, scales_again = method.encode(opened(path)["layers.0.mlp.down.kernel"][...], table=False)
    np.testing.assert_array_equal(again, values)
    np.testing.assert_allclose(scales_again, scales, rtol=3e-7)
    assert opened(path)["layers.0.mlp.down.kernel"].blocks() is None


def test_rows_that_a_format_does_not_divide_stay_as_they_are(made, tmp_path):
    config = made.LLAMA | {"intermediate_size": 72}
    tensors = made.tensors(config)
    path = convert(
        made.folder(tmp_path / "hf", config, tensors), tmp_path / "out", quantization="q4_0"
    )
    weights = opened(path)
    np.testing.assert_array_equal(
        weights["layers.0.mlp.down.kernel"][...], tensors["model.layers.0.mlp.down_proj.weight"].T
    )
    assert weights["layers.0.mlp.gate_up.kernel"].parts[0].format == "q4_0"


def test_a_gguf_can_be_quantized_to_less(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    file = made.gguf(tmp_path / "m.gguf", made.LLAMA, tensors, Q.Q8_0)
    path = convert(file, tmp_path / "out", quantization="q4_0")
    rounded = {name: through("q8_0", a) if a.ndim == 2 else a for name, a in tensors.items()}
    wanted = through("q4_0", rounded["model.layers.0.self_attn.o_proj.weight"]).T
    found = opened(path)["layers.0.attention.out.kernel"][...]
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_fingerprints_differ_by_quantization_and_by_content(made, tmp_path):
    source = made.folder(tmp_path / "hf", made.LLAMA)
    paths = [convert(source, tmp_path / q, quantization=q) for q in ("q4_0", "q8_0", "int8")]
    again = convert(source, tmp_path / "again", quantization="q4_0")
    found = [fingerprint(read_info(path)) for path in (*paths, again)]
    assert len(set(found)) == 3
    assert found[0] == found[3]


def test_a_table_that_does_not_fit_its_arrays_is_refused(made, tmp_path):
    path = convert(made.folder(tmp_path / "hf", made.LLAMA), tmp_path / "out", quantization="q4_0")
    table = path / "weights.json"
    text = table.read_text()
    table.write_text(text.replace('"q4_0"', '"q8_0"', 1))
    with pytest.raises(CheckpointError, match="1 misshapen"):
        opened(path)
    table.write_text(text.replace('"q4_0"', '"q9_9"', 1))
    with pytest.raises(CheckpointError, match="cannot be q9_9"):
        opened(path)


def test_what_cannot_be_quantized_says_so(made, tmp_path):
    source = made.folder(tmp_path / "hf", made.BERT)
    with pytest.raises(ConfigError, match="an embedding model is not quantized"):
        convert(source, tmp_path / "out", quantization="q8_0")
    with pytest.raises(ConfigError, match=r"quantized to 'q3'; none, int8"):
        convert(source, tmp_path / "out", quantization="q3")
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def rows_of_many_kinds():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(24, 512)).astype(np.float32) * 0.03
    rows[0] = 0
    rows[1] = 1.0
    rows[2] = -0.25
    rows[3, :256] = 0
    rows[4] = np.abs(rows[4])
    rows[5] = -np.abs(rows[5])
    rows[6, 7] = 40.0  # an outlier
    rows[7] *= 0.1
    rows[8] *= 1e4
    return rows


@pytest.mark.parametrize(
    ("format", "peer", "ratio"),
    [("q4_k", "q4_1", 0.96), ("q5_k", "q5_1", 0.97), ("q6_k", "q5_1", 0.5)],
)
def test_kquants_are_as_near_as_their_bits_allow(format, peer, ratio):
    """Beside ggml's reference in formats of as many bits, by its own dequantization."""
    rows = rows_of_many_kinds()
    found = through(format, rows)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1:3], rows[1:3], rtol=2e-3)
    usual = slice(9, None)

    def error(values):
        return np.sqrt(np.mean((values[usual] - rows[usual]) ** 2))

    assert error(found) < ratio * error(through(peer, rows))
    # No number is further away than those of its block are apart.
    blocks = rows.reshape(-1, 32)
    spans = np.maximum(blocks.max(1), 0) - np.minimum(blocks.min(1), 0)
    apart = spans / {"q4_k": 15, "q5_k": 31, "q6_k": 31}[format]
    worst = np.abs(found - rows).reshape(-1, 32).max(1)
    coarse = np.abs(rows).reshape(-1, 256).max(1).repeat(8) / 63  # scales and minima have 6 bits
    assert (worst <= apart + coarse + 1e-6).all()
