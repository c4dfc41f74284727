"""Reader of GGUF files, the format of llama.cpp.

Sources: the GGUF specification for keys and tensor names, and llama.cpp's converter for its changes
to the tensors, which this reader undoes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import shown
from inferneo_jax.weights.sources.gguf_header import TensorInfo, read_header
from inferneo_jax.weights.sources.gguf_metadata import Metadata
from inferneo_jax.weights.sources.source import SourceModel
from inferneo_jax.weights.sources.tensor import FileTensor

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bert": "BertModel",
    "nomic-bert": "NomicBertModel",
}
_ENCODERS = frozenset({"bert", "nomic-bert"})
# For these architectures, the converter reorders the rows of each query and key head from the
# two-halves form of rotary embeddings to the interleaved form.
_PERMUTED = frozenset({"llama"})
_POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_ROPE_FREQS = "rope_freqs.weight"


def read_gguf(path: Path) -> SourceModel:
    """Open the model in a GGUF file; its tensors are read and dequantized on demand.

    Raises:
        CheckpointError: the file is damaged or split, its architecture is not supported, or it
            holds a block type that cannot be dequantized.
    """
    # Imported here because the tokenizers library is slow to load and only conversion needs it.
    from inferneo_jax.weights.sources.gguf_tokenizer import gguf_tokenizer

    path = Path(path)
    header = read_header(path)
    metadata = Metadata(header.metadata, CheckpointError)
    if (metadata.integer("split.count") or 0) > 1 or _SPLIT_NAME.search(path.name):
        raise CheckpointError(
            f"{path} is one part of a split GGUF; "
            "join the parts with `llama-gguf-split --merge` and give the result"
        )
    arch = known_architecture(metadata.text("general.architecture"), path)
    infos = dict(header.tensors)
    rope_freqs = infos.pop(_ROPE_FREQS, None)
    config = _config(path, arch, metadata, infos)
    if rope_freqs is not None:
        config["rope_scaling"] = _llama3_scaling(path, rope_freqs, config)
    heads = {}
    if arch in _PERMUTED:
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, info in infos.items():
        role = name.split(".")[-2] if name.count(".") > 1 else ""
        tensors[name] = _stored(path, name, info, heads.get(role))
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), config["num_hidden_layers"]
    )
    tokenizer, tokenizer_config = gguf_tokenizer(header.metadata)
    return SourceModel(
        path=path,
        format="gguf",
        config=config,
        tensors=tensors,
        tensor_name=lambda name: names.get_name(name, (".weight", ".bias")) or name,
        tokenizer_json=tokenizer.to_str(),
        tokenizer_config=tokenizer_config,
        eos_token_ids=_eos_ids(metadata),
        bos_token_id=metadata.integer("tokenizer.ggml.bos_token_id"),
        licence=metadata.text("general.license"),
        origin={"file": path.name, "name": metadata.text("general.name")},
    )


def known_architecture(arch: object, where: object) -> str:
    """The ``general.architecture`` of a GGUF, if it is supported; ``where`` names the model.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        raise CheckpointError(
            f"{where} is a GGUF of the architecture {shown(arch)}; "
            f"those read are {', '.join(_ARCHITECTURES)}"
        )
    return arch


def _config(
    path: Path, arch: str, metadata: Metadata, infos: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """Translate the metadata into the keys of a Hugging Face config."""

    def integer(key: str, default: int | None = None) -> int:
        value = metadata.integer(f"{arch}.{key}", default, least=1)
        if not value:  # a default can be 0: a head_dim, if there are more heads than features
            raise CheckpointError(
                f"{path}: {arch}.{key} is missing; it must be one integer above 0"
            )
        return value

    def real(key: str, default: float) -> float:
        # The value is stored as float32. The shortest decimal that rounds to it is what the
        # model's author wrote.
        return float(str(np.float32(metadata.number(f"{arch}.{key}", default))))

    if experts := metadata.integer(f"{arch}.expert_count"):
        raise CheckpointError(f"{path} is a mixture of {experts} experts, which is not supported")
    if "token_embd.weight" not in infos:
        raise CheckpointError(f"{path} has no token_embd.weight; it is not a whole model")
    if (layers := integer("block_count")) > len(infos):
        raise CheckpointError(f"{path} announces {layers} layers and holds {len(infos)} tensors")
    hidden_size, num_heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden_size // num_heads)
    rotated = integer("rope.dimension_count", head_dim)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": infos["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rope_theta": real("rope.freq_base", 10_000.0),
        "partial_rotary_factor": rotated / head_dim,
    }
    kind = metadata.text(f"{arch}.rope.scaling.type", "none")
    if kind != "none":
        config["rope_scaling"] = {"rope_type": kind, "factor": real("rope.scaling.factor", 1.0)}
    if arch in _ENCODERS:
        pooling = metadata.integer(f"{arch}.pooling_type", 1)
        return config | {
            "is_decoder": metadata.flag(f"{arch}.attention.causal", False),
            "layer_norm_eps": real("attention.layer_norm_epsilon", 1e-12),
            "sentence_transformers": {"pooling": _POOLINGS.get(pooling or 0, pooling)},
            "type_vocab_size": info.shape[0] if (info := infos.get("token_types.weight")) else None,
        }
    return config | {
        "num_key_value_heads": integer("attention.head_count_kv", num_heads),
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon", 1e-5),
        "sliding_window": metadata.integer(f"{arch}.attention.sliding_window"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in infos,
    }


def _llama3_scaling(path: Path, info: TensorInfo, config: Mapping[str, Any]) -> dict[str, Any]:
    """Recover the Llama 3 rope scaling from its table of frequency divisors.

    The file holds only the table. Every Llama 3 release computed it from the same three constants
    and a factor, which is the table's largest entry. A table that these do not reproduce raises
    CheckpointError.
    """
    low, high, original = 1.0, 4.0, 8192
    whole = info.shape == (config["head_dim"] // 2,)
    divisors = _stored(path, _ROPE_FREQS, info).read() if whole else np.zeros(1)
    factor = float(divisors.max())
    inverse = config["rope_theta"] ** (-np.arange(divisors.size) / divisors.size)
    turns = original * inverse / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    # A factor that is 0, negative or NaN makes ``expected`` NaN, which np.allclose rejects.
    expected = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else np.nan
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{path}: {_ROPE_FREQS} is not the table of Llama 3; "
            "take the model's safetensors release, which says how it was made"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _eos_ids(metadata: Metadata) -> tuple[int, ...]:
    """The tokens that end a text, a turn or a message; a chat model stops at any it defines."""
    kinds = ("eos", "eot", "eom")
    ids = {metadata.integer(f"tokenizer.ggml.{kind}_token_id") for kind in kinds}
    return tuple(sorted(i for i in ids if i is not None))


def _stored(
    path: Path, name: str, info: TensorInfo, interleaved_heads: int | None = None
) -> FileTensor:
    return FileTensor(
        file=path,
        name=name,
        shape=info.shape,
        format=info.type.name.lower(),
        offset=info.offset,
        size=info.size,
        interleaved_heads=interleaved_heads,
    )
