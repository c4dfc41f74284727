"""Matrices in the block formats of ggml: quantized by its library, or random where it cannot."""

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_SCALES = {
    GGMLQuantizationType.Q2_K: (80, 82),
    GGMLQuantizationType.Q3_K: (108,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
    GGMLQuantizationType.IQ4_NL: (0,),
    GGMLQuantizationType.IQ4_XS: (0,),
    GGMLQuantizationType.IQ3_S: (0,),
}
"""The formats that the library does not make: where a block has its float16 factors."""


def blocks_of(weights: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Blocks ``[rows, bytes]`` of a format: of the weights, or random ones of the same size."""
    if kind not in _SCALES:
        return gguf.quants.quantize(weights, kind)
    per_block, size = GGML_QUANT_SIZES[kind]
    rows, columns = weights.shape
    rng = np.random.default_rng(rows + columns)
    blocks = rng.integers(0, 256, (rows, columns // per_block, size), np.uint8)
    factors = rng.uniform(0.5, 1.5, (len(_SCALES[kind]), rows, columns // per_block, 1))
    scale = 1.0
    for _ in range(2):  # all weights are proportional to the factors
        for at, factor in zip(_SCALES[kind], factors, strict=True):
            blocks[..., at : at + 2] = (scale * factor).astype(np.float16).view(np.uint8)
        made = gguf.quants.dequantize(blocks.reshape(rows, -1), kind)
        scale *= np.sqrt(np.mean(np.square(weights)) / np.mean(np.square(made)))
    return blocks.reshape(rows, -1)
