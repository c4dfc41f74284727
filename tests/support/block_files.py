"""Rows of block formats as a file has them, and what the ``gguf`` library makes of them."""

import gguf
import numpy as np

from inferneo_jax.layers.blocks import BlockPart, BlockRows

# Where the float16 numbers of a block are: its scale, and that of its minima.
_SCALES: dict[str, tuple[int, ...]] = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "iq3_s": (0,),
}


def _type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def block_inputs(name: str) -> int:
    """Inputs of a block."""
    return gguf.GGML_QUANT_SIZES[_type(name)][0]


def random_rows(name: str, rows: int, inputs: int, scale: float | None = None) -> np.ndarray:
    """Rows of any bytes, except that scales are numbers: random ones of either sign, or ``scale``.

    So every value, scale and minimum that a format knows occurs.
    """
    rng = np.random.default_rng([rows, inputs])
    block, size = gguf.GGML_QUANT_SIZES[_type(name)]
    made = rng.integers(0, 256, (rows, inputs // block, size), np.uint8)
    for at in _SCALES[name]:
        numbers = rng.normal(0, 0.02, (rows, inputs // block)) if scale is None else scale
        halves = np.broadcast_to(np.float16(numbers), (rows, inputs // block))
        made[..., at : at + 2] = np.ascontiguousarray(halves)[..., None].view(np.uint8)
    return made.reshape(rows, -1)


def rows_like(weights: np.ndarray, name: str) -> np.ndarray:
    """The weights, quantized; or random rows of their size where ``gguf`` cannot quantize."""
    try:
        return gguf.quants.quantize(weights, _type(name))
    except NotImplementedError:
        # All numbers of a row are proportional to the scales.
        ones = dequantized(name, random_rows(name, *weights.shape, scale=1.0))
        size = float(np.sqrt(np.mean(np.square(weights)) / np.mean(np.square(ones))))
        return random_rows(name, *weights.shape, scale=size)


def dequantized(name: str, rows: np.ndarray) -> np.ndarray:
    """The float32 numbers of rows, ``[rows, inputs]``."""
    return gguf.quants.dequantize(rows, _type(name))


def blocks_of(name: str, rows: np.ndarray) -> tuple[BlockRows, ...]:
    """A matrix whose outputs are these rows."""
    return (BlockRows(BlockPart(name, ((0, len(rows)),)), (rows,)),)
