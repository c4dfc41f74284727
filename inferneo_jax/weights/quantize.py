"""Quantizes the tensors of a model for a checkpoint: which of them, and to which format.

int8 is this package's own format: a row has its numbers as int8, followed by their scale in
float32. The others are ggml's block formats.
"""

from collections.abc import Callable, Mapping

import numpy as np

from inferneo_jax.config import DecoderConfig, ModelConfig
from inferneo_jax.errors import ConfigError
from inferneo_jax.layers.blocks import Bytes
from inferneo_jax.weights.kquants import encode_kquants
from inferneo_jax.weights.sources.tensor import (
    BLOCKS,
    INT8,
    Array,
    StoredTensor,
    stored_bytes,
)
from inferneo_jax.weights.sources.weight import SourceWeight

_FINE = "q8_0"
"""For tables and heads, whose errors reach every token, where the other matrices have 4 or 5 bits,
and for matrices whose rows a format cannot divide. Beside K-quants it is q6_k, as in llama.cpp."""

_KQUANTS = ("q6_k", "q5_k", "q4_k")
QUANTIZATIONS = ("none", INT8, "q8_0", *_KQUANTS, "q5_1", "q5_0", "q4_1", "q4_0")
"""``none`` keeps each tensor in its own dtype, or dequantizes its blocks."""


def target_formats(
    weights: Mapping[str, SourceWeight], config: ModelConfig, quantization: str
) -> dict[str, str]:
    """The format of each tensor in a quantized checkpoint, by its Hugging Face name.

    Raises:
        ConfigError: the quantization is unknown, or the model is an encoder.
    """
    if quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"a model cannot be quantized to {quantization!r}; {', '.join(QUANTIZATIONS)} are there"
        )
    if quantization != "none" and not isinstance(config, DecoderConfig):
        raise ConfigError(
            "an embedding model is not quantized: it would change the angles between texts; "
            "convert it without --quantization"
        )
    found = {}
    for name, weight in weights.items():
        for mapping, tensor in zip(weight.mapping.tensors, weight.tensors, strict=True):
            own = str(tensor.dtype.name)
            own = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[own]
            wanted = _wanted(name, weight, config, quantization)
            fits = [f for f in (wanted, _FINE) if f and stored_bytes(f, tensor.shape)]
            found[mapping.name] = fits[0] if wanted and fits else own
    return found


def _wanted(name: str, weight: SourceWeight, config: ModelConfig, quantization: str) -> str | None:
    """The format of a weight's tensors; None for their own."""
    table = name == "embed.table"
    if quantization == "none" or not (weight.mapping.kernel or table):
        return None
    if quantization == INT8:
        tied = isinstance(config, DecoderConfig) and config.tie_embeddings
        return None if table and not tied else INT8
    fine = "q6_k" if quantization in _KQUANTS else _FINE
    return fine if table or name == "head.kernel" else quantization


def quantized(tensor: StoredTensor, format: str, each: Callable[[int], None]) -> Array:
    """All numbers of a tensor in a format: floats of its shape, or ``[rows, bytes of a row]``.

    Args:
        tensor: to be read, span by span.
        format: that of the result.
        each: called after each span, with the number of rows that are done.

    Raises:
        CheckpointError: it cannot be read.
    """
    if format not in BLOCKS and format != INT8:
        values = tensor.read()
        each(tensor.shape[0])
        return values
    size = stored_bytes(format, tensor.shape)
    assert size
    found = np.empty((tensor.shape[0], size // tensor.shape[0]), np.uint8)
    for start, rows in tensor.pieces():
        found[start : start + len(rows)] = encode_rows(format, rows.astype(np.float32, copy=False))
        each(start + len(rows))
    return found


def encode_rows(format: str, rows: Array) -> Bytes:
    """Quantize float32 rows, ``[rows, columns]``, to ``[rows, bytes of a row]``."""
    if format == INT8:
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / np.float32(127)
        values = np.rint(rows / scales).astype(np.int8)
        return np.concatenate([values.view(np.uint8), scales.view(np.uint8)], axis=1)
    if format in _KQUANTS:
        return encode_kquants(format, rows)
    import gguf

    found: Bytes = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[format.upper()])
    return found
