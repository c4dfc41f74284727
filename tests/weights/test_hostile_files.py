"""Model files from anyone: a broken one is one error of ours, within 1 s and 200 MB."""

import itertools
import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferneo_jax.config import DecoderConfig
from inferneo_jax.errors import (
    CheckpointError,
    ConfigError,
    InferneoError,
    RequestError,
    TokenizerError,
    WeightsError,
)
from inferneo_jax.text.tokenizer import Tokenizer
from inferneo_jax.weights.catalog import load_catalog
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.convert import convert, read_model
from server.cli.main import main
from tests.support.model_files import LLAMA
from tests.weights.fuzz import SECONDS
from tests.weights.mutations import (
    TEMPLATE,
    Gguf,
    added,
    bpe,
    floats,
    ints,
    replace,
    split,
    stage,
    text,
    texts,
)

# GGUF


@pytest.fixture
def whole(made, tmp_path) -> Gguf:
    return Gguf(made.gguf(tmp_path / "m.gguf", LLAMA, made.tensors(LLAMA)).read_bytes())


def with_key(whole: Gguf, name: str, value: bytes) -> bytes:
    keys = [entry for entry in whole.keys if entry[0] != name]
    return whole.joined([*keys, (name, text(name) + value)], whole.tensors)


def refused(file: Path, data: bytes, error: type[InferneoError] = CheckpointError) -> str:
    file.write_bytes(data)
    with pytest.raises(error) as raised:
        read_model(file)
    assert str(file) in str(raised.value)
    return str(raised.value)


U32 = struct.pack("<II", 4, 10**9)
TEXT = struct.pack("<I", 8) + text("7")
LIST = texts(["a", "b"])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("split.count", TEXT, "split.count is '7'; it must be an integer"),
        ("general.architecture", LIST, "general.architecture is ['a', 'b']; it must be a text"),
        ("general.license", U32, "general.license is 1000000000; it must be a text"),
        ("general.name", LIST, "general.name is"),
        ("general.alignment", struct.pack("<II", 4, 0), "general.alignment is 0"),
        ("llama.block_count", U32, "announces 1000000000 layers"),
        ("llama.attention.head_count", U32, "must be one integer above 0"),
        ("llama.rope.freq_base", TEXT, "llama.rope.freq_base is '7'; it must be a number above 0"),
        ("llama.rope.freq_base", struct.pack("<If", 6, np.nan), "freq_base is nan"),
        ("llama.rope.scaling.type", LIST, "it must be a text"),
        ("llama.attention.sliding_window", TEXT, "sliding_window is '7'; it must be an integer"),
        ("llama.context_length", struct.pack("<IQ", 10, 2**40), "context_length is 1099511627776"),
        ("llama.expert_count", LIST, "expert_count is ['a', 'b']"),
        ("tokenizer.ggml.eos_token_id", LIST, "eos_token_id is ['a', 'b']"),
        ("tokenizer.ggml.eot_token_id", struct.pack("<II", 4, 400), "ends with the token 400"),
        ("tokenizer.ggml.bos_token_id", struct.pack("<Ii", 5, -1), "bos_token_id is -1"),
        ("tokenizer.ggml.tokens", floats([1.0]), "tokens is [1.0]; it must be a list of texts"),
        ("tokenizer.ggml.tokens", texts(["x" * 2000]), "tokens[0] has 2000 characters"),
        ("tokenizer.ggml.tokens", texts([b"\xff"]), "'tokenizer.ggml.tokens'[0] is not UTF-8"),
        ("tokenizer.ggml.token_type", TEXT, "token_type is '7'; it must be a list of numbers"),
        ("tokenizer.ggml.merges", ints([1]), "merges is [1]; it must be a list of texts"),
        ("tokenizer.ggml.pre", LIST, "pre is ['a', 'b']; it must be a text"),
        ("tokenizer.ggml.model", LIST, "model is ['a', 'b']; it must be a text"),
        ("tokenizer.ggml.add_bos_token", LIST, "add_bos_token is ['a', 'b']"),
        ("tokenizer.chat_template", LIST, "chat_template is ['a', 'b']; it must be a text"),
        ("\x1b[2J", struct.pack("<I", 77), r"'\x1b[2J' is of the unknown type 77"),
    ],
)
def test_a_key_of_another_type_or_size_is_refused_by_name(whole, tmp_path, key, value, says):
    assert says in refused(tmp_path / "b.gguf", with_key(whole, key, value), InferneoError)


def header(kinds_and_counts: list[tuple[int, int]], content: bytes) -> bytes:
    """A file of one key: arrays within arrays, and what is in the innermost."""
    key = text("k") + struct.pack("<I", 9)
    for kind, count in kinds_and_counts:
        key += struct.pack("<IQ", kind, count)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + content


MILLION = 10**6


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (header([(9, MILLION)], struct.pack("<IQ", 4, 0) * MILLION), "an array of arrays"),
        (header([(9, 1)] * 3000, b""), "an array of arrays"),
        (header([(0, 2**22)], bytes(2**22)), "announces 4194304 items in 'k'"),
        (header([(8, MILLION)], bytes(8 * MILLION)), "the architecture None"),
        (header([(8, MILLION)], struct.pack("<Q", 2**63) * MILLION), "ends at byte"),
        (header([(12, 2**60)], bytes(64)), "announces 1152921504606846976 items in 'k'"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64), "tensors at byte"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, MILLION) + bytes(13 * MILLION), "1000000 keys"),
    ],
    ids=["arrays", "nested", "bytes", "texts", "lengths", "count", "tensors", "keys"],
)
def test_a_header_costs_no_more_than_its_bytes(tmp_path, data, says):
    start = time.process_time()
    assert says in refused(tmp_path / "b.gguf", data)
    assert time.process_time() - start < SECONDS


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> tuple[str, bytes]:
    entry = text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return name, entry + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([tensor("t", [])], "'t' has 0 dimensions; it must have 1 to 4"),
        ([tensor("t", [1] * 5)], "'t' has 5 dimensions"),
        ([tensor("t", [2, 0])], "'t' has the shape [0, 2], and so no values"),
        ([tensor("t", [2**63, 2**63])], "'t' ends at byte"),
        ([tensor("t", [33], 8)], "rows of 33, no multiple of 32 (Q8_0)"),
        ([tensor("t", [1], 99)], "'t' is of the unknown type 99"),
        ([tensor("t", [1], offset=2**63)], "'t' ends at byte"),
        ([tensor("t", [8]), tensor("u", [8], offset=16)], "'t' and 'u' overlap"),
        ([tensor("t", [8]), tensor("t", [8], offset=32)], "two tensors of the name 't'"),
        ([tensor("t" * 65, [8])], "a text of 65 bytes; at most 64 are read"),
        ([tensor("\x1b[2J", [2**40])], r"'\x1b[2J' ends at byte"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_by_name(whole, tmp_path, tensors, says):
    assert says in refused(tmp_path / "b.gguf", whole.joined(whole.keys, tensors))


def test_a_key_may_be_there_once(whole, tmp_path):
    data = whole.joined([*whole.keys, whole.keys[0]], whole.tensors)
    assert "has the key 'general.architecture' twice" in refused(tmp_path / "b.gguf", data)


def test_a_table_of_rope_frequencies_is_looked_at_before_it_is_read(made, whole, tmp_path):
    """Its values, and another tensor in its place."""
    for freqs in (np.full(8, np.nan, np.float32), np.zeros(8, np.float32), np.ones(9, np.float32)):
        tensors = made.tensors(LLAMA) | {"rope_freqs.weight": freqs}
        data = made.gguf(tmp_path / "f.gguf", LLAMA, tensors).read_bytes()
        assert "is not the table of Llama 3" in refused(tmp_path / "b.gguf", data)


def test_pieces_that_make_each_other_in_too_many_ways_are_refused(whole, tmp_path):
    """Every text of two letters up to a length is a token: 19 ways to make each of a million."""
    pieces = ["".join(p) for n in range(1, 17) for p in itertools.product("ab", repeat=n)]
    tokens = ["<unk>", "<s>", "</s>", *pieces]
    keys = {
        "tokenizer.ggml.model": struct.pack("<I", 8) + text("llama"),
        "tokenizer.ggml.tokens": texts(list(tokens)),
        "tokenizer.ggml.scores": floats([0.0] * len(tokens)),
        "tokenizer.ggml.token_type": ints([1] * len(tokens)),
    }
    kept = [entry for entry in whole.keys if entry[0] not in keys]
    data = whole.joined([*kept, *((k, text(k) + v) for k, v in keys.items())], whole.tensors)
    assert "1048576 ways" in refused(tmp_path / "b.gguf", data, TokenizerError)


# Hugging Face folders


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_hidden_layers": 10**9}, ConfigError, "num_layers is 1000000000"),
        ({"hidden_size": 2**40}, ConfigError, "hidden_size is 1099511627776"),
        ({"num_attention_heads": 0}, ConfigError, "num_attention_heads is 0"),
        ({"num_attention_heads": 128, "num_key_value_heads": 128}, ConfigError, "head_dim is 0"),
        ({"rms_norm_eps": "1e-5"}, ConfigError, "rms_norm_eps is '1e-5'"),
        ({"architectures": [["a"]]}, ConfigError, "architectures is [['a']]"),
        ({"architectures": 7}, ConfigError, "architectures is 7"),
        ({"architectures": None, "model_type": ["llama"]}, ConfigError, "model_type None"),
        ({"quantization_config": "q"}, ConfigError, "quantization_config is 'q'"),
        ({"sliding_window": "64"}, ConfigError, "sliding_window is '64'"),
        ({"layer_types": 7}, ConfigError, "layer_types is 7"),
        ({"rope_scaling": {"rope_type": ["x"]}}, ConfigError, "rope scaling ['x']"),
        ({"rope_parameters": [1]}, ConfigError, "rope_parameters is [1]"),
        ({"tie_word_embeddings": "yes"}, ConfigError, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": ["a"]}, TokenizerError, "eos_token_id is ['a']"),
        ({"eos_token_id": -1}, TokenizerError, "eos_token_id is -1"),
        ({"bos_token_id": 2**30}, TokenizerError, "bos_token_id is 1073741824"),
        ({"vocab_size": 9}, InferneoError, "config.json"),
    ],
)
def test_a_config_of_absurd_values_is_refused_by_name(made, tmp_path, change, error, says):
    folder = made.folder(tmp_path / "hf", LLAMA)
    made.json(folder / "config.json", LLAMA | change)
    with pytest.raises(error) as raised:
        read_model(folder)
    assert str(folder) in str(raised.value)
    if says != "config.json":
        assert says in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b'{"hidden_size": NaN}', "cannot be read"),
        ("config.json", b"[]", "holds []; it must hold a JSON object"),
        ("config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000, "cannot be read"),
        ("config.json", b"[" + b"[]," * 200_000 + b"1]", "200001 arrays; at most 131072"),
        ("config.json", b" " * (2**24 + 1), "bytes; at most 16777216 are read"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "eos_token is 7; it must be a text"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template is 7"),
        ("tokenizer_config.json", b'{"chat_template": {"a": 1}}', "chat_template is {'a': 1}"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": []}]}',
            "neither a text nor a list",
        ),
        ("tokenizer_config.json", b'{"x": "\\ud800"}', "cannot be read"),
        ("special_tokens_map.json", b'{"bos_token": []}', "bos_token is []"),
        ("generation_config.json", b"7", "holds 7; it must hold a JSON object"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
        ("chat_template.jinja", b" " * (2**20 + 1), "at most 1048576 are read"),
        ("modules.json", b"[7]", "the module 7, which names no type"),
        ("modules.json", b'[{"type": "a.Pooling", "path": "../.."}]', "outside of the folder"),
        ("modules.json", b'[{"type": "a.Pooling", "path": "/etc"}]', "outside of the folder"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(made, tmp_path, name, content, says):
    folder = made.folder(tmp_path / "hf", LLAMA)
    (folder / name).write_bytes(content)
    with pytest.raises(InferneoError) as raised:
        read_model(folder)
    assert says in str(raised.value)
    assert str(folder) in str(raised.value)


def test_links_and_pipes_bring_nothing_in_from_elsewhere(made, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{{ 'mine' }}")
    folder = made.folder(tmp_path / "hf", LLAMA)
    (folder / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(TokenizerError, match=r"is a link to .*secret, outside the model's folder"):
        read_model(folder)
    (folder / "chat_template.jinja").unlink()
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(TokenizerError, match="not a regular file"):
        read_model(folder)
    (folder / "chat_template.jinja").unlink()
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "large.safetensors")
    os.mkfifo(weights)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_model(folder)
    weights.unlink()
    # Weights may lie on another disk: nothing but tensors can be read from there.
    weights.symlink_to(tmp_path / "large.safetensors")
    assert read_model(folder).weights


def test_the_links_of_the_hubs_cache_are_followed(made, tmp_path):
    folder = made.folder(tmp_path / "models--org--name" / "snapshots" / "revision", LLAMA)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / f"0{file.name}")
        file.symlink_to(Path("../../blobs") / f"0{file.name}")
    assert read_model(folder).source.eos_token_ids == (2,)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", "", "a\0b", 7, [1]])
def test_an_index_names_only_files_of_its_folder(made, tmp_path, shard):
    folder = made.folder(tmp_path / "hf", LLAMA)
    (folder / "model.safetensors").unlink()
    made.json(folder / "model.safetensors.index.json", {"weight_map": {"a": shard}})
    with pytest.raises(CheckpointError, match="outside the folder"):
        read_model(folder)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it has 0 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "its header has 18446744073709551615 bytes"),
        (struct.pack("<Q", 2**23 + 1) + b" " * 2**24, "at most 8388608 are read"),
        ({f"{i}": EMPTY for i in range(50_000)}, "has 50000 tensors; at most 32768 are read"),
        ({"a": EMPTY | {"shape": [0] * 9}}, "'a' has 9 dimensions"),
        ({"x" * 600: EMPTY}, "a name of 600 characters"),
        ({"a": EMPTY | {"data_offsets": [0, 2**63]}}, "is not a whole safetensors file"),
        ({"a": EMPTY | {"shape": [2**63, 2]}}, "is not a whole safetensors file"),
        ({"\x1b[2J": EMPTY}, r"'\x1b[2J'"),
    ],
)
def test_a_safetensors_header_costs_no_more_than_its_bounds(made, tmp_path, data, says):
    folder = made.folder(tmp_path / "hf", LLAMA)
    if isinstance(data, dict):
        head = json.dumps(data).encode()
        data = struct.pack("<Q", len(head)) + head
    (folder / "model.safetensors").write_bytes(data)
    start = time.process_time()
    with pytest.raises(CheckpointError) as raised:
        read_model(folder)
    assert says in str(raised.value)
    assert time.process_time() - start < SECONDS


# Tokenizers


def loaded(folder: Path, **parts: Any) -> Tokenizer:
    whole: dict[str, Any] = {"version": "1.0", "model": bpe(), **parts}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return Tokenizer.from_directory(folder)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": bpe(vocab={"a": 2**32 - 1})}, "highest id of model.vocab is [4294967295"),
        ({"model": bpe(vocab={"a": "b"})}, "model.vocab has the id 'b'"),
        ({"added_tokens": [added("q", 2**32 - 1)]}, "id of an added token is [4294967295]"),
        ({"added_tokens": [added("q" * 2**20, 2), added("r", 3)]}, "2 added tokens of 1048577"),
        ({"added_tokens": 7}, "added_tokens is not a list"),
        ({"normalizer": stage("Sequence", normalizers=[replace("a", "aa")] * 40)}, "1.1e+12 times"),
        ({"normalizer": replace("", "x" * 100)}, "lengthen a text 101 times"),
        ({"decoder": stage("Sequence", decoders=[replace("a", "aaaaaaaaa")])}, "lengthen a text 9"),
        (
            {"normalizer": stage("Precompiled", precompiled_charsmap="AAAA")},
            "is none of sentencepiece",
        ),
        (
            {"post_processor": stage("TemplateProcessing", **TEMPLATE, special_tokens={})},
            "adds '<s>', which its special_tokens do not define",
        ),
        ({"pre_tokenizer": stage("Sequence", pretokenizers=[split("a")] * 99)}, "has 100 steps"),
        ({"pre_tokenizer": split("x" * 2**16)}, "bytes and 0 of character mappings"),
        ({"pre_tokenizer": split("(")}, "cannot be read"),
        (
            {"model": stage("WordPiece", vocab={}, unk_token="", max_input_chars_per_word=2**40)},
            "model.max_input_chars_per_word is 1099511627776; at most 1024",
        ),
        ({"model": stage("Unigram", vocab=[["x" * (2**23 + 1), 0.0]])}, "8388609 bytes"),
        ({"model": bpe(merges=["a x"])}, "cannot be read"),
    ],
)
def test_a_tokenizer_that_would_cost_or_break_too_much_is_refused(tmp_path, parts, says):
    with pytest.raises(TokenizerError) as raised:
        loaded(tmp_path, **parts)
    assert says in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_panic_of_the_library_is_the_fault_of_the_text(tmp_path):
    """Oniguruma gives up a match after 10 million steps, whatever the pattern."""
    tokenizer = loaded(tmp_path, pre_tokenizer=split("(a+)+b"))
    assert tokenizer.encode("a") == [0]
    with pytest.raises(RequestError, match="retry-limit-in-match over"):
        tokenizer.encode("a" * 40)
    strips = loaded(tmp_path, decoder=stage("Strip", content="a", start=0, stop=9))
    with pytest.raises(RequestError, match="cannot be decoded"):
        strips.decode([0])


def test_a_byte_token_that_is_none_is_spelled_as_it_reads(tmp_path):
    marks = stage("Sequence", decoders=[replace("▁", " "), stage("ByteFallback")])
    model = bpe(vocab={"<0xZZ>": 0, "<0x41>": 1})
    tokenizer = loaded(tmp_path, model=model, decoder=marks)
    assert (tokenizer.token_bytes(0), tokenizer.token_bytes(1)) == (b"<0xZZ>", b"A")


@pytest.mark.parametrize(
    "info", [b'{"eos_token_ids": [[]]}', b'{"eos_token_ids": 1e9}', b'{"bos_token_id": "a"}', b"7"]
)
def test_a_checkpoints_own_ids_are_token_ids(tmp_path, info):
    (tmp_path / "inferneo.json").write_bytes(info)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        loaded(tmp_path)


# Our own files


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return convert(made.folder(folder / "hf", LLAMA), folder / "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {"num_layers": 10**9}}, "num_layers is 1000000000"),
        ({"config": {"vocab_size": "8"}}, "vocab_size is '8'"),
        ({"config": {"norm_eps": 0}}, "norm_eps is 0"),
        ({"config": {"rope_scaling": 7}}, "RopeScaling is 7"),
        ({"config": {"rope_scaling": {"kind": [], "factor": 1}}}, "kind is []"),
        ({"config": {"tie_embeddings": 1}}, "tie_embeddings is 1"),
        ({"family": ["llama"]}, "['llama'] is not a text"),
        ({"created": 1e300}, "1e+300 is not a time of conversion"),
        ({"eos_token_ids": [-1]}, "-1 is not a token id"),
        ({"eos_token_ids": [[]]}, "unhashable"),
        ({"bos_token_id": 2**40}, "1099511627776 is not a token id"),
        ({"kind": []}, "unhashable"),
        ({"format": list(range(10**5))}, "has format [0, 1, 2"),
    ],
)
def test_a_hostile_description_is_refused(checkpoint, tmp_path, change, says):
    path = shutil.copytree(checkpoint, tmp_path / "m")
    values = json.loads((path / "inferneo.json").read_text())
    for key, value in change.items():
        merged = {**values[key], **value} if key == "config" else value
        (path / "inferneo.json").write_text(json.dumps(values | {key: merged}))
        with pytest.raises(CheckpointError) as raised:
            read_info(path)
        assert says in str(raised.value)
        assert "convert the model again" in str(raised.value)


def test_a_configuration_is_bounded_whoever_makes_it():
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "mlp_size", "num_layers"), 4)
    sizes |= dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "context_length"), 4)
    assert DecoderConfig(**sizes)
    for name in sizes:
        for value in (0, -1, 2**40, True, 4.0, "4", None):
            with pytest.raises(ConfigError, match=f"{name} is "):
                DecoderConfig(**sizes | {name: value})


@pytest.mark.parametrize(
    "content", ["a = 1", "[m]\nkind = 1", "[m]", "x" + "[" * 5000, "a = " + "[" * 5000, "\0"]
)
def test_a_catalog_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "catalog.toml").write_text(content)
    with pytest.raises(CheckpointError, match="the catalog"):
        load_catalog(tmp_path / "catalog.toml")


def test_a_catalog_of_other_types_is_refused(tmp_path):
    entry = {"kind": "chat", "file": "b", "sha256": "c", "size": 1}
    entry |= {"licence": "d", "description": "e", "unpack": "f"}
    part = {"requirement": "a", "sha256": "b", "size": 1, "member": "c"}
    for name in (*entry, *part):
        lines = [f"{key} = {json.dumps([] if key == name else v)}" for key, v in entry.items()]
        values = [f"{key} = {json.dumps([] if key == name else v)}" for key, v in part.items()]
        lines += ["[[m.sources]]", f"parts = [{{ {', '.join(values)} }}]"]
        (tmp_path / "catalog.toml").write_text("\n".join(["[m]", *lines]))
        with pytest.raises(CheckpointError, match=r"of m is \[\]"):
            load_catalog(tmp_path / "catalog.toml")


# The command


def test_converting_a_broken_file_is_one_line_and_leaves_nothing(
    made, whole, tmp_path, monkeypatch, capfd
):
    store = tmp_path / "store"
    bad = {
        "arrays.gguf": header([(9, MILLION)], struct.pack("<IQ", 4, 0) * MILLION),
        "cut.gguf": whole.data[:9000],
        "type.gguf": with_key(whole, "split.count", TEXT),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    layers = made.folder(tmp_path / "layers", LLAMA)
    made.json(layers / "config.json", LLAMA | {"num_hidden_layers": 10**9})
    grows = made.folder(tmp_path / "grows", LLAMA)
    made.json(grows / "tokenizer.json", {"model": bpe(), "normalizer": replace("", "x" * 99)})
    for name in [*bad, "layers", "grows"]:
        source = str(tmp_path / name)
        monkeypatch.setattr(
            "sys.argv", ["inferneo", "convert", source, "--checkpoints", str(store)]
        )
        with pytest.raises(SystemExit) as raised:
            main()
        assert raised.value.code == 1
        printed = capfd.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith(f"error: {source}")
        assert not store.exists() or not list(store.iterdir())


def test_a_weight_that_nobody_wants_is_named_in_plain_letters(made, tmp_path):
    tensors = made.tensors(LLAMA) | {"\x1b[2J\u202e": np.zeros(3, np.float32)}
    with pytest.raises(WeightsError) as raised:
        convert(made.folder(tmp_path / "hf", LLAMA, tensors), tmp_path / "out")
    assert r"1 unused ('\x1b[2J\u202e')" in str(raised.value)
