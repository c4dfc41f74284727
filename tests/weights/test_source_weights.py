"""Slices and blocks of weights that are read from the files of other formats."""

import os
from dataclasses import replace

import gguf
import numpy as np
import pytest

from inferneo_jax.errors import CheckpointError
from inferneo_jax.layers.blocks import BlockPart
from inferneo_jax.models.families import find_family
from inferneo_jax.weights.convert import read_model
from inferneo_jax.weights.sources.tensor import BLOCKS
from inferneo_jax.weights.sources.weight import block_formats
from tests.support.weights import joined

Q = gguf.GGMLQuantizationType


def family_config(made, model_type):
    if model_type in ("bert", "nomic_bert"):
        return {"bert": made.BERT, "nomic_bert": made.NOMIC_BERT}[model_type]
    return made.LLAMA | {"model_type": model_type, "architectures": None, "head_dim": 16}


def expected(config, tensors):
    family = find_family(config)
    mappings = family.weight_map(family.read_config(config))
    return {n: joined(m, *[tensors[t.name] for t in m.tensors]) for n, m in mappings.items()}


def in_spans(model, span_bytes):
    """The weights of a model, read in spans of other sizes."""
    return {
        name: replace(
            weight, tensors=tuple(replace(each, span_bytes=span_bytes) for each in weight.tensors)
        )
        for name, weight in model.weights.items()
    }


def slices(shape):
    """The whole, and a part of each dimension alone and of all together."""
    part = [slice(size // 3, size // 3 + max(1, size // 2)) for size in shape]
    yield tuple(slice(0, size) for size in shape)
    for dim in range(len(shape)):
        yield tuple(part[d] if d == dim else slice(None) for d in range(len(shape)))
    yield tuple(part)


def assert_all_slices_equal(weights, wanted):
    assert weights.keys() == wanted.keys()
    for name, whole in wanted.items():
        assert weights[name].shape == whole.shape
        for index in slices(whole.shape):
            found = weights[name][index]
            np.testing.assert_array_equal(found, whole[index], err_msg=f"{name} {index}")


@pytest.mark.parametrize("span", [64, 2**22])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "bert", "nomic_bert"])
def test_slices_equal_those_of_the_whole_weight(made, tmp_path, model_type, span):
    config = family_config(made, model_type)
    tensors = made.tensors(config)
    model = read_model(made.folder(tmp_path / "hf", config, tensors))
    assert_all_slices_equal(in_spans(model, span), expected(config, tensors))
    assert not block_formats(model.weights)


MIXED = {"v_proj": Q.Q8_0, "down_proj": Q.F16, "lm_head": Q.Q5_1}


def mixed(made, tmp_path):
    """A model of several block types, and the numbers they stand for."""
    tensors = made.tensors(made.LLAMA)
    path = made.gguf(tmp_path / "m.gguf", made.LLAMA, tensors, Q.Q4_1, exceptions=MIXED)
    rounded = {}
    for name, array in tensors.items():
        kind = next((each for part, each in MIXED.items() if part in name), Q.Q4_1)
        if array.ndim == 2:
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        rounded[name] = array
    return read_model(path), expected(made.LLAMA, rounded)


@pytest.mark.parametrize("span", [64, 2**22])
def test_slices_of_blocks_equal_the_reference_dequantization(made, tmp_path, span):
    model, wanted = mixed(made, tmp_path)
    assert_all_slices_equal(in_spans(model, span), wanted)


def test_parts_say_which_outputs_are_of_which_format(made, tmp_path):
    model, wanted = mixed(made, tmp_path)
    formats = block_formats(model.weights)
    kernels = {name for name in wanted if name.endswith(("kernel", "table"))}
    assert formats.keys() == {name for name in kernels if "mlp.down" not in name}
    dim, group = 16, 2
    per_head = (group + 2) * dim
    assert formats["layers.0.attention.qkv.kernel"] == (
        # The queries of both KV heads, then both keys.
        BlockPart(
            "q4_1",
            (
                (0, group * dim),
                (per_head, group * dim),
                (group * dim, dim),
                (per_head + group * dim, dim),
            ),
        ),
        BlockPart("q8_0", ((per_head - dim, dim), (2 * per_head - dim, dim))),
    )
    assert formats["layers.0.mlp.gate_up.kernel"] == (BlockPart("q4_1", ((0, 2 * 96),)),)
    assert formats["embed.table"] == (BlockPart("q4_1", ((0, wanted["embed.table"].shape[0]),)),)
    assert formats["head.kernel"][0].format == "q5_1"


@pytest.mark.parametrize("span", [64, 2**22])
def test_blocks_are_the_outputs_of_their_runs(made, tmp_path, span):
    model, wanted = mixed(made, tmp_path)
    weights = in_spans(model, span)
    for name in block_formats(weights):
        weight, whole = weights[name], wanted[name]
        outputs = whole if name.endswith("table") else whole.reshape(64, -1).T
        found = np.full(outputs.shape, np.nan, np.float32)
        for part, stored in weight.blocks():
            numbers = gguf.quants.dequantize(np.concatenate(stored), Q[part.format.upper()])
            places = np.concatenate([np.arange(a, a + n) for a, n in part.runs])
            found[places] = numbers
        np.testing.assert_array_equal(found, outputs, err_msg=name)
    assert model.weights["layers.0.mlp.down.kernel"].blocks() is None


def test_a_slice_of_rows_reads_little_more_than_these_rows(made, tmp_path, monkeypatch):
    model = read_model(made.folder(tmp_path / "hf", made.LLAMA))
    read = []
    preadv = os.preadv

    def counting(descriptor, buffers, offset):
        read.append(sum(len(each) for each in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    weight = in_spans(model, 1024)["layers.0.mlp.gate_up.kernel"]
    weight[:, :, 8:16]  # of 96 rows of 256 bytes each, in two tensors
    assert sum(read) <= 2 * (8 * 256 + 2 * 1024)


def test_a_file_that_has_become_shorter_is_an_error(made, tmp_path):
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    model = read_model(folder)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte \d+, within"):
        [weight[...] for weight in model.weights.values()]


def test_sizes_of_blocks_are_those_of_ggml():
    sizes = {Q[name.upper()]: each for name, each in BLOCKS.items()}
    assert sizes == {kind: gguf.GGML_QUANT_SIZES[kind] for kind in sizes}
