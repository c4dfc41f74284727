import json
from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from inferneo_jax.errors import CheckpointError, ConfigError, WeightsError
from inferneo_jax.models import weight_specs
from inferneo_jax.models.families import find_family
from inferneo_jax.weights.checkpoint import open_weights, read_info
from inferneo_jax.weights.convert import convert, read_model, read_source
from tests.support.weights import joined

Q = gguf.GGMLQuantizationType


def restored(path, dtype=np.float32):
    shapes = {name: spec.shape for name, spec in weight_specs(read_info(path).config).items()}
    return {name: weight[...].astype(dtype) for name, weight in open_weights(path, shapes).items()}


def expected(config, tensors):
    family = find_family(config)
    weight_map = family.weight_map(family.read_config(config))
    return {n: joined(r, *[tensors[p.name] for p in r.tensors]) for n, r in weight_map.items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("kind", ["LLAMA", "BERT"])
def test_converted_weights_equal_the_source(made, tmp_path, kind):
    config = getattr(made, kind)
    tensors = made.tensors(config)
    stages = []
    path = convert(
        made.folder(tmp_path / "hf", config, tensors),
        tmp_path / "out",
        lambda *report: stages.append(report),
    )
    assert_equal(restored(path), expected(config, tensors))
    size = sum(array.nbytes for array in tensors.values())
    assert stages[0] == ("checking", 0, size)
    assert stages[-1] == ("checking", size, size)
    info = read_info(path)
    assert info.eos_token_ids == (2,)
    assert info.config.vocab_size == config["vocab_size"]


def test_shards_equal_a_single_file(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    single = made.folder(tmp_path / "single", made.LLAMA, tensors)
    sharded = made.folder(tmp_path / "sharded", made.LLAMA, tensors)
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, sharded / shard)
        places |= dict.fromkeys(part, shard)
    made.json(sharded / "model.safetensors.index.json", {"weight_map": places})
    one, other = read_source(single), read_source(sharded)
    assert_equal(
        {n: t.read() for n, t in other.tensors.items()},
        {n: t.read() for n, t in one.tensors.items()},
    )
    (sharded / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} is missing"):
        read_source(sharded)
    (sharded / shard).write_bytes(b"\x10" * 64)
    with pytest.raises(CheckpointError, match=f"{shard} is not a whole"):
        read_source(sharded)
    made.json(sharded / "model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}})
    with pytest.raises(CheckpointError, match="outside the folder"):
        read_source(sharded)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_dtype_of_the_source_is_kept(made, tmp_path, dtype):
    tensors = made.tensors(made.LLAMA, dtype)
    folder = made.folder(tmp_path / "hf", made.LLAMA, tensors)
    assert all(t.read().dtype == dtype for t in read_source(folder).tensors.values())
    path = convert(folder, tmp_path / "out")
    found = restored(path, dtype)
    assert all(array.dtype == dtype for array in found.values())
    assert_equal(found, expected(made.LLAMA, tensors))


def test_mixed_dtypes_join_without_loss(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    low = "model.layers.0.self_attn.q_proj.weight"
    tensors[low] = tensors[low].astype(ml_dtypes.bfloat16)
    path = convert(made.folder(tmp_path / "hf", made.LLAMA, tensors), tmp_path / "out")
    assert_equal(restored(path), expected(made.LLAMA, tensors))


@pytest.mark.parametrize(
    "kind",
    [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0],
    ids=lambda kind: kind.name,
)
def test_a_gguf_equals_the_safetensors_of_its_values(made, tmp_path, kind):
    tensors = made.tensors(made.LLAMA)
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        if array.ndim == 2
        else array.astype(np.float16 if kind == Q.F16 else np.float32)
        for name, array in tensors.items()
    }
    # Rounding is by blocks of columns, so it does not care for the order of the rows.
    path = convert(made.gguf(tmp_path / "m.gguf", made.LLAMA, tensors, kind), tmp_path / "out")
    assert_equal(restored(path), expected(made.LLAMA, rounded))
    info = read_info(path)
    reference = find_family(made.LLAMA).read_config(made.LLAMA)
    assert info.config == reference
    assert info.eos_token_ids == (0, 2)
    assert info.bos_token_id == 1


def test_a_gguf_without_output_weights_is_tied(made, tmp_path):
    config = made.LLAMA | {"tie_word_embeddings": True}
    tensors = made.tensors(config)
    path = convert(made.gguf(tmp_path / "m.gguf", config, tensors), tmp_path / "out")
    assert read_info(path).config.tie_embeddings
    assert_equal(restored(path), expected(config, tensors))


def test_rope_freqs_become_llama3_scaling_or_are_refused(made, tmp_path):
    # Frequencies of at least 4 turns in 8192 positions stay, those of at most 1 are divided.
    table = []
    for index in range(8):
        turns = 8192 * 10000.0 ** (-index / 8) / (2 * np.pi)
        blend = (turns - 1) / 3
        table.append(1 if turns >= 4 else 32 if turns <= 1 else 1 / ((1 - blend) / 32 + blend))
    assert table[0] == 1
    assert table[-1] == 32
    freqs = {"rope_freqs.weight": np.array(table, np.float32)}
    tensors = made.tensors(made.LLAMA)
    source = read_source(made.gguf(tmp_path / "m.gguf", made.LLAMA, tensors | freqs))
    scaling = find_family(source.config).read_config(source.config).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context_length) == ("llama3", 32, 8192)
    assert "rope_freqs.weight" not in source.tensors
    freqs["rope_freqs.weight"] *= 2
    bad = made.gguf(tmp_path / "b.gguf", made.LLAMA, tensors | freqs)
    with pytest.raises(CheckpointError, match="rope_freqs"):
        read_source(bad)


def test_missing_unused_and_misshapen_tensors_are_all_named(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 64), np.float32)
    folder = made.folder(tmp_path / "hf", made.LLAMA, tensors)
    with pytest.raises(WeightsError) as raised:
        convert(folder, tmp_path / "out")
    text = str(raised.value)
    assert "1 missing (model.norm.weight)" in text
    assert "1 unused (model.extra.weight)" in text
    assert "1 misshapen (model.layers.0.mlp.up_proj.weight is [3, 64], not [96, 64])" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_prefix_and_known_leftovers_do_not_matter(made, tmp_path):
    tensors = made.tensors(made.BERT)
    other = {f"bert.{name}": array for name, array in tensors.items()}
    other["bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    other["bert.embeddings.position_ids"] = np.zeros((1, 64), np.int64)
    path = convert(made.folder(tmp_path / "hf", made.BERT, other), tmp_path / "out")
    assert_equal(restored(path), expected(made.BERT, tensors))


def test_a_truncated_gguf_is_an_error_at_every_length(made, tmp_path):
    whole = made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 7, 8, 20, 24, 100, 5000, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole GGUF file"):
            read_source(cut)


def test_a_corrupt_gguf_header_never_escapes_as_another_error(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    whole = made.gguf(tmp_path / "m.gguf", made.LLAMA, tensors).read_bytes()
    header = len(whole) - sum(array.nbytes for array in tensors.values())
    bad = tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, header, 150):
        bad.write_bytes(whole[:at] + rng.bytes(8) + whole[at + 8 :])
        try:
            read_source(bad)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 20


def encoder_config(made, folder, kind, **changes):
    """What is read from the GGUF of an encoder with further integers in its metadata."""
    config = getattr(made, kind) | {"vocab_size": len(made.WORDS)}
    arch, causal = kind.lower().replace("_", "-"), changes.pop("causal", False)

    def extra(writer):
        for key, value in changes.items():
            writer.add_uint32(f"{arch}.{key}", value)

    file = folder / "m.gguf"
    made.encoder_gguf(file, config, made.tensors(config), extra=extra, causal=causal)
    return read_model(file).config


@pytest.mark.parametrize("kind", ["BERT", "NOMIC_BERT"])
def test_the_gguf_of_an_encoder_says_how_it_pools(made, tmp_path, kind):
    mean, cls = (encoder_config(made, tmp_path, kind, pooling_type=n) for n in (1, 2))
    assert encoder_config(made, tmp_path, kind) == mean == replace(cls, pooling="mean")
    assert cls.pooling == "cls"
    for number, named in ((0, "'none'"), (3, "'last'"), (4, "'rank'"), (9, "9")):
        with pytest.raises(ConfigError, match=f"pooling is {named}"):
            encoder_config(made, tmp_path, kind, pooling_type=number)
    with pytest.raises(ConfigError, match="is_decoder is True"):
        encoder_config(made, tmp_path, kind, causal=True)


def test_a_gguf_that_rotates_parts_of_heads_is_refused(made, tmp_path):
    with pytest.raises(ConfigError, match=r"partial_rotary_factor is 0\.5"):
        encoder_config(made, tmp_path, "NOMIC_BERT", **{"rope.dimension_count": 4})


def test_split_and_foreign_ggufs_are_refused(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    split = made.gguf(
        tmp_path / "s.gguf", made.LLAMA, tensors, extra=lambda w: w.add_uint16("split.count", 2)
    )
    with pytest.raises(CheckpointError, match="gguf-split"):
        read_source(split)
    experts = made.gguf(
        tmp_path / "e.gguf", made.LLAMA, tensors, extra=lambda w: w.add_expert_count(8)
    )
    with pytest.raises(CheckpointError, match="mixture of 8 experts"):
        read_source(experts)


def test_integer_tensors_are_refused(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is of the type 'I8'"):
        convert(made.folder(tmp_path / "hf", made.LLAMA, tensors), tmp_path / "out")


def test_a_path_that_is_no_model_says_what_would_be(made, tmp_path):
    with pytest.raises(CheckpointError, match="no file or folder"):
        read_source(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_source(tmp_path)
    made.gguf(tmp_path / "a.gguf", made.LLAMA, made.tensors(made.LLAMA))
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        read_source(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(CheckpointError, match="neither"):
        read_source(tmp_path / "x.bin")


def test_the_tokenizer_neither_cuts_nor_pads(made, tmp_path):
    path = convert(made.folder(tmp_path / "hf", made.LLAMA), tmp_path / "out")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    assert tokenizer["truncation"] is None
    assert tokenizer["padding"] is None


@pytest.mark.real
def test_the_real_chat_model_has_the_names_and_shapes_of_its_config(real_checkpoints):
    path = real_checkpoints / "smollm2-135m-instruct"
    info = read_info(path)
    assert (info.family, info.config.num_layers, info.eos_token_ids) == ("llama", 30, (2,))
    found = restored(path)
    assert {n: a.shape for n, a in found.items()} == {
        n: s.shape for n, s in weight_specs(info.config).items()
    }
    assert all(np.isfinite(array).all() for array in found.values())
