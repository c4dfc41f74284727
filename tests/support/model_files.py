"""Tiny models in other projects' file formats, generated on demand."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from inferneo_jax.config import DecoderConfig
from inferneo_jax.models.families import find_family
from tests.support.block_files import rows_like

SPECIAL = ["<unk>", "<s>", "</s>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# A writer leaves out empty lists, so there is one merge.
MERGES = [("a", "b")]
TOKENS = SPECIAL + ALPHABET + ["ab"]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}


NOMIC_BERT = {
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_act": "silu",
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "##ly", *"abcABC,.", "##a", "##b"]


def random_tensors(config: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A tensor for each source name that the config's family asks for."""
    family = find_family(config)
    weight_map = family.weight_map(family.read_config(config))
    rng = np.random.default_rng(0)
    return {
        tensor.name: rng.standard_normal(tensor.shape).astype(dtype)
        for mapping in weight_map.values()
        for tensor in mapping.tensors
    }


def byte_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return str(tokenizer.to_str())


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None
) -> Path:
    """A model folder in Hugging Face form with one weight file."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "</s>"}})
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    tensors = random_tensors(config) if tensors is None else tensors
    save_file(
        {n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter writes the rows of queries and keys."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def llama_config(model: DecoderConfig) -> dict[str, Any]:
    """What a Llama's config.json says of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context_length,
    }


def write_gguf(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    exceptions: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
) -> Path:
    """The same model as llama.cpp's converter would write it.

    Matrices are of block type ``kind``, unless ``exceptions`` has another for a part of the name.
    """
    writer = gguf.GGUFWriter(file, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    extra(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, array in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            array = interleaved(array, heads if ".q_proj." in name else kv_heads)
        own = names.get_name(name, (".weight",)) or name
        form = next((each for part, each in exceptions.items() if part in name), kind)
        if array.ndim == 2 and form not in (0, 1):
            writer.add_tensor(own, rows_like(array, form.name.lower()), raw_dtype=form)
        else:
            writer.add_tensor(own, array.astype(np.float16 if form == 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def marked_words(tokens: Sequence[str], special: int) -> list[str]:
    """A WordPiece vocabulary as llama.cpp's converter writes it; special tokens come first."""
    pieces = [t[2:] if t.startswith("##") else f"\u2581{t}" for t in tokens[special:]]
    return [*tokens[:special], *pieces]


def write_encoder_gguf(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    words: Sequence[str] = WORDS,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    *,
    causal: bool = False,
) -> Path:
    """An encoder in float32 as llama.cpp's converter would write it."""
    rotary = config["model_type"] == "nomic_bert"
    arch = gguf.MODEL_ARCH.NOMIC_BERT if rotary else gguf.MODEL_ARCH.BERT
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(causal)
    if rotary:
        writer.add_rope_freq_base(1000.0)
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_tokenizer_model("bert")
    writer.add_token_list(marked_words(words, 4))
    writer.add_token_types([3] * 4 + [1] * (len(words) - 4))
    for add, number in (
        (writer.add_pad_token_id, 0),
        (writer.add_unk_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_eos_token_id, 3),
        (writer.add_sep_token_id, 3),
    ):
        add(number)
    extra(writer)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, array in tensors.items():
        if own := names.get_name(name, (".weight", ".bias")):  # the pooler has none
            writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """The configs and builders of this module."""
    return SimpleNamespace(
        LLAMA=LLAMA,
        BERT=BERT,
        NOMIC_BERT=NOMIC_BERT,
        WORDS=WORDS,
        tensors=random_tensors,
        folder=write_folder,
        gguf=write_gguf,
        encoder_gguf=write_encoder_gguf,
        json=write_json,
        tokenizer=byte_tokenizer,
    )
