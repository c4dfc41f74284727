"""Checkpoints whose weights stay in the files of another format."""

import json
import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest

from inferneo_jax.errors import CheckpointError
from inferneo_jax.models import weight_specs
from inferneo_jax.weights import convert as convert_module
from inferneo_jax.weights.checkpoint import fingerprint, open_weights, read_info
from inferneo_jax.weights.convert import convert, describe, read_model
from inferneo_jax.weights.table import read_table
from server.cli.plan_cli import find_model
from server.config.settings import Settings
from server.models.sources import folder_of, sources_of

Q4 = gguf.GGMLQuantizationType.Q4_0


def weights_of(path):
    shapes = {name: spec.shape for name, spec in weight_specs(read_info(path).config).items()}
    return open_weights(path, shapes)


def numbers_of(path):
    return {name: weight[...] for name, weight in weights_of(path).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.fixture(params=["gguf", "safetensors"])
def source(request, made, tmp_path):
    """A model in another format, and its file of weights."""
    tensors = made.tensors(made.LLAMA)
    folder = tmp_path / "models"
    folder.mkdir()
    if request.param == "gguf":
        file = made.gguf(folder / "m.gguf", made.LLAMA, tensors, Q4)
        return file, file
    hf = made.folder(folder / "hf", made.LLAMA, tensors)
    return hf, hf / "model.safetensors"


def test_a_conversion_has_the_file_itself(source, tmp_path):
    path, file = source
    before = file.stat().st_nlink
    folder = convert(path, tmp_path / "out")
    (own,) = (f for f in folder.iterdir() if f.suffix in (".gguf", ".safetensors"))
    assert own.samefile(file)
    assert file.stat().st_nlink == before + 1
    numbers = numbers_of(folder)
    file.unlink()
    assert_same(numbers_of(folder.rename(tmp_path / "moved")), numbers)


def test_a_file_that_cannot_be_linked_is_copied(source, tmp_path, monkeypatch):
    path, file = source

    def refuse(*args):
        raise OSError(18, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    folder = convert(path, tmp_path / "out")
    (own,) = (f for f in folder.iterdir() if f.suffix in (".gguf", ".safetensors"))
    assert own.read_bytes() == file.read_bytes()
    assert not own.samefile(file)
    numbers_of(folder)


def test_a_description_lies_beside_the_file_and_is_made_once(source, tmp_path):
    path, _ = source
    folder = describe(path, tmp_path / "checkpoints")
    assert folder == path.with_name(f"{path.name}.inferneo")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 100_000
    assert_same(numbers_of(folder), numbers_of(convert(path, tmp_path / "out")))
    made = (folder / "inferneo.json").stat().st_mtime_ns
    reports = []
    assert describe(path, tmp_path / "checkpoints", lambda *each: reports.append(each)) == folder
    assert not reports
    assert (folder / "inferneo.json").stat().st_mtime_ns == made
    assert describe(folder, tmp_path / "checkpoints") == folder
    # Both are moved, and nothing has to be found again.
    numbers = numbers_of(folder)
    moved = path.parent.rename(tmp_path / "elsewhere")
    assert_same(numbers_of(moved / folder.name), numbers)


def test_a_file_that_has_been_replaced_is_described_again(made, tmp_path):
    tensors = made.tensors(made.LLAMA)
    path = made.gguf(tmp_path / "m.gguf", made.LLAMA, tensors, Q4)
    folder = describe(path, tmp_path / "checkpoints")
    before = numbers_of(folder)
    other = {name: array + 1 for name, array in tensors.items()}
    made.gguf(path, made.LLAMA, other, Q4)
    with pytest.raises(CheckpointError, match=r"m\.gguf is damaged: bytes \d+ to \d+"):
        numbers_of(folder)
    assert describe(path, tmp_path / "checkpoints") == folder
    assert (numbers_of(folder)["embed.table"] != before["embed.table"]).any()


def test_where_nothing_can_be_written_the_description_is_among_the_checkpoints(
    source, tmp_path, monkeypatch
):
    path, _ = source
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != path.parent and access(p, mode))
    checkpoints = tmp_path / "checkpoints"
    folder = describe(path, checkpoints)
    assert folder.parent == checkpoints
    assert folder.name.startswith(path.stem)
    assert describe(path, checkpoints) == folder
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    numbers_of(folder.rename(tmp_path / "moved"))  # the file is where it was


def test_a_start_reads_no_header_and_no_tokenizer(source, tmp_path):
    path, _ = source
    folder = convert(path, tmp_path / "out")
    code = (
        "import sys, pathlib\n"
        "from inferneo_jax.models import weight_specs\n"
        "from inferneo_jax.weights.checkpoint import open_weights, read_info\n"
        f"path = pathlib.Path({str(folder)!r})\n"
        "specs = weight_specs(read_info(path).config)\n"
        "weights = open_weights(path, {n: s.shape for n, s in specs.items()})\n"
        "parts = [weight.blocks() for weight in weights.values()]\n"
        "heavy = {'gguf', 'safetensors', 'tensorstore', 'tokenizers', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_flipped_byte_is_noticed_when_it_is_read(source, tmp_path):
    path, file = source
    folder = convert(path, tmp_path / "out")
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for name, tensor in read_table(folder).items():
        if "layers.1" in name:
            continue
        place = tensor.offset + int(rng.integers(tensor.size))
        with tensor.file.open("r+b") as opened:
            opened.seek(place)
            opened.write(bytes([content[place] ^ 1 << int(rng.integers(8))]))
        with pytest.raises(CheckpointError, match=f"is damaged: .*{tensor.name}") as raised:
            tensor.read()
        assert "inferneo rm" in str(raised.value)
        if tensor.blocks:
            with pytest.raises(CheckpointError, match="is damaged"):
                tensor.read_blocks()
        with tensor.file.open("r+b") as opened:
            opened.seek(place)
            opened.write(content[place : place + 1])
    numbers_of(folder)


def test_a_file_that_is_gone_or_cut_short_is_named(source, tmp_path):
    path, _ = source
    folder = convert(path, tmp_path / "out")
    (own,) = (f for f in folder.iterdir() if f.suffix in (".gguf", ".safetensors"))
    size = own.stat().st_size
    os.truncate(own, size - 1)
    with pytest.raises(CheckpointError, match=rf"has {size - 1} bytes, and had {size}"):
        weights_of(folder)
    own.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*put it back"):
        weights_of(folder)
    own.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        weights_of(folder)


def test_fingerprints_are_those_of_the_content(source, made, tmp_path):
    path, file = source
    one, two = convert(path, tmp_path / "one"), convert(path, tmp_path / "two")
    assert fingerprint(read_info(one)) == fingerprint(read_info(two))
    tensors = made.tensors(made.LLAMA)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
    if file == path:
        made.gguf(path, made.LLAMA, tensors, Q4)
    else:
        shutil.rmtree(path)
        made.folder(path, made.LLAMA, tensors)
    other = convert(path, tmp_path / "other")
    assert fingerprint(read_info(one)) != fingerprint(read_info(other))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "q6_k"},
        {"format": "f8_e4m3"},
        {"shape": [0, 64]},
        {"shape": [2**62, 2**62]},
        {"shape": [96.0, 64]},
        {"shape": None},
        {"offset": -1},
        {"offset": 2**62},
        {"file": 1},
        {"file": -1},
        {"interleaved_heads": 5},
        {"checksums": ""},
        {"checksums": "zzzzzzzz"},
        {"checksums": 7},
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_its_files_is_refused(made, tmp_path, change):
    path = made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA), Q4)
    folder = describe(path, tmp_path / "checkpoints")
    table = json.loads((folder / "weights.json").read_text())
    table["tensors"]["model.layers.0.mlp.up_proj.weight"] |= change
    (folder / "weights.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"weights\.json is not what this version writes"):
        weights_of(folder)


def test_a_table_that_lacks_a_tensor_is_refused(made, tmp_path):
    path = made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA), Q4)
    folder = describe(path, tmp_path / "checkpoints")
    table = json.loads((folder / "weights.json").read_text())
    del table["tensors"]["model.norm.weight"]
    (folder / "weights.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.norm\.weight\)"):
        weights_of(folder)
    (folder / "weights.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights\.json"):
        weights_of(folder)
    assert describe(path, tmp_path / "checkpoints") == folder
    numbers_of(folder)


def test_two_that_describe_at_once_both_succeed(made, tmp_path, monkeypatch):
    path = made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA), Q4)
    read = convert_module.read_model

    def meanwhile(path):
        monkeypatch.setattr(convert_module, "read_model", read)
        describe(path, tmp_path / "checkpoints")
        return read(path)

    monkeypatch.setattr(convert_module, "read_model", meanwhile)
    numbers_of(describe(path, tmp_path / "checkpoints"))


def test_a_file_or_folder_can_be_served_where_it_is(source, tmp_path):
    path, _ = source
    settings = Settings(models=(str(path),), checkpoints=str(tmp_path / "checkpoints"))
    (found,) = sources_of(settings)
    assert found.id == path.stem
    folder = folder_of(found, settings, lambda *report: None)
    assert folder == path.with_name(f"{path.name}.inferneo")
    numbers_of(folder)


def test_a_file_can_be_planned_where_it_is(source):
    path, _ = source
    assert find_model(str(path)) == read_model(path).config
    assert list(path.parent.iterdir()) == [path]
