"""How much memory a loader takes for one shard of a model that is larger than this machine.

    python -m tests.tools.sharded_loading FOLDER --shard 3 --of 8

makes FOLDER, unless it is there: Llama 3.1 70B in bfloat16 as Hugging Face has it, in sparse files
of zeros, 141 GB that take no disk. Then every weight is read and encoded as the process does that
holds one shard of the mesh, and is dropped at once, so what is shown is all that loading takes
beyond the weights that stay.
"""

import argparse
import json
import math
import resource
import struct
import time
from pathlib import Path

from inferneo_jax import models
from inferneo_jax.layers.quantization import QuantizationConfig
from inferneo_jax.models.families import find_family
from inferneo_jax.sharding.padding import PaddedWeight, pad_for_mesh
from inferneo_jax.weights.convert import read_model
from inferneo_jax.weights.placement import _shard
from tests.support.model_files import byte_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
SHARD_BYTES = 5 * 10**9


def make(folder: Path) -> None:
    """A folder in Hugging Face's layout, whose shards are sparse files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    family = find_family(CONFIG)
    mappings = family.weight_map(family.read_config(CONFIG)).values()
    shapes = {t.name: t.shape for mapping in mappings for t in mapping.tensors}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            places[name] = file.name
        text = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--of", type=int, default=8)
    options = parser.parse_args()
    if not options.folder.exists():
        make(options.folder)
    opened = read_model(options.folder)
    model, padded = opened.config, pad_for_mesh(opened.config, options.of)
    specs = models.weight_specs(padded, QuantizationConfig.unquantized("bfloat16"))
    declared = models.weight_specs(model)
    before, start = peak(), time.monotonic()
    resident = largest = 0
    for number, (name, spec) in enumerate(specs.items(), 1):
        group = model.group_size, padded.group_size
        whole = opened.weights[name]
        weight = PaddedWeight(whole, declared[name].shape, spec.shape, spec.axes, group)
        read = weight[_shard(spec, options.shard, options.of)]
        split = [
            size // (options.of if axis else 1)
            for size, axis in zip(spec.flat_shape, spec.flat_axes, strict=True)
        ]
        size = sum(array.nbytes for array in spec.encode(read.reshape(split)))
        resident, largest = resident + size, max(largest, size)
        del read
        print(f"\r{number} of {len(specs)}", end="", flush=True)
    print(
        f"\rshard {options.shard} of {options.of}: {resident / 1e9:.2f} GB stay, the largest array "
        f"{largest / 1e9:.2f} GB; peak {peak() / 1e9:.2f} GB, {(peak() - before) / 1e9:.2f} GB "
        f"of it for loading; {time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
