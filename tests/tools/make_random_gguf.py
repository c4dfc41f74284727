"""Writes a GGUF in the shape of Llama-3.1-8B, quantized as Q4_K_M, with random weights.

``python -m tests.tools.make_random_gguf FILE --vocabulary-of OTHER.gguf`` (4.9 GB, a minute)

It measures memory and speed where no file of a real model of this size is at hand. The vocabulary
is the beginning of another GGUF's. Tensors are written one by one, so memory stays small. Their
types are those of llama.cpp's Q4_K_M: Q6_K for the output layer and, in half of the layers, for
values and down projections; Q4_K for all other matrices.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Q4_K, Q6_K, F32 = (
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.F32,
)
VOCABULARY, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128256, 4096, 14336, 32, 32, 8, 128
END = "<|end_of_text|>"
DEVIATION = 0.02
"""Standard deviation of the weights."""


def tensors(vocabulary: int, layers: int) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Names, shapes (rows first) and types of the tensors, in the order of the file."""
    yield "token_embd.weight", (vocabulary, HIDDEN), Q4_K
    for layer in range(layers):
        # llama.cpp gives more bits to the first and last eighth, and to every third in between.
        eighth = layers // 8
        more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        best = Q6_K if more else Q4_K
        prefix = f"blk.{layer}."
        yield prefix + "attn_norm.weight", (HIDDEN,), F32
        yield prefix + "attn_q.weight", (HEADS * HEAD_DIM, HIDDEN), Q4_K
        yield prefix + "attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN), Q4_K
        yield prefix + "attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN), best
        yield prefix + "attn_output.weight", (HIDDEN, HEADS * HEAD_DIM), Q4_K
        yield prefix + "ffn_norm.weight", (HIDDEN,), F32
        yield prefix + "ffn_gate.weight", (MLP, HIDDEN), Q4_K
        yield prefix + "ffn_up.weight", (MLP, HIDDEN), Q4_K
        yield prefix + "ffn_down.weight", (HIDDEN, MLP), best
    yield "output_norm.weight", (HIDDEN,), F32
    yield "output.weight", (vocabulary, HIDDEN), Q6_K


def values(shape: tuple[int, ...], kind: Any, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Ones for a norm, else random blocks whose weights have a mean of 0 and ``DEVIATION``."""
    if kind is F32:
        return np.ones(shape, np.float32)
    per_block, size = GGML_QUANT_SIZES[kind]
    rows, columns = shape
    blocks = random.integers(0, 256, (rows, columns // per_block, size), np.uint8)
    if kind is Q4_K:  # d, dmin, 12 bytes of six-bit scales and minima, nibbles
        step = DEVIATION / (32 * 4.6)
        blocks[..., :4] = np.array([step, 7.5 * step], np.float16).view(np.uint8)
        # Every scale and minimum is 32: six bits each, the upper two apart for the last four.
        blocks[..., 4:12] = 0b10_100000
        blocks[..., 12:16] = 0
    else:  # low bits, high bits, sixteen int8 scales, d
        blocks[..., 192:208] = 32
        step = DEVIATION / (32 * 18.5)
        blocks[..., 208:] = np.array([step], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(file: Path, other: Path, vocabulary: int, layers: int) -> None:
    """Write the model to ``file``, with the vocabulary of the GGUF ``other``."""
    fields = gguf.GGUFReader(other).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()[: vocabulary - 1]
    known = set(tokens)
    merges = [
        merge
        for merge in fields["tokenizer.ggml.merges"].contents()
        if merge.replace(" ", "") in known
    ]
    kinds = [*fields["tokenizer.ggml.token_type"].contents()[: len(tokens)], 3]

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Random 8B")
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens) + 1)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list([*tokens, END])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens))
    writer.add_add_bos_token(False)

    wanted = list(tensors(len(tokens) + 1, layers))
    for name, shape, kind in wanted:
        per_block, size = GGML_QUANT_SIZES[kind]
        elements = int(np.prod(shape))
        stored = shape if kind is F32 else (*shape[:-1], shape[-1] // per_block * size)
        dtype = np.dtype(np.float32 if kind is F32 else np.uint8)
        writer.add_tensor_info(
            name, stored, dtype, elements // per_block * size, None if kind is F32 else kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, shape, kind in wanted:
        writer.write_tensor_data(values(shape, kind, random))
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--vocabulary-of", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    write(arguments.file, arguments.vocabulary_of, arguments.vocabulary, max(arguments.layers, 8))
