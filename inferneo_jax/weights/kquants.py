"""Quantizes to ggml's K-quants: super-blocks of 256 numbers, whose scales are quantized too.

The `gguf` library reads these formats and does not write them. Scales and minima are searched for
as ggml's reference does (`make_qkx2_quants`, `make_qx_quants`): each block is tried with a few
steps, and each time the scale and the minimum that fit best are solved for by least squares.
"""

from typing import Any

import numpy as np

from inferneo_jax.layers.blocks import Bytes

Floats = np.ndarray[Any, np.dtype[np.float32]]
Array = np.ndarray[Any, np.dtype[Any]]

SUPER = 256
_TINY = np.float32(1e-30)


def encode_kquants(format: str, rows: Floats) -> Bytes:
    """Quantize rows, ``[rows, columns]`` with columns that 256 divides, to their stored bytes.

    Args:
        format: ``q4_k``, ``q5_k`` or ``q6_k``.
        rows: float32.

    Returns:
        ``[rows, bytes of a row]``.
    """
    blocks = rows.reshape(-1, SUPER)
    if format == "q6_k":
        found = _q6_k(blocks)
    else:
        found = _with_minima(blocks, {"q4_k": 4, "q5_k": 5}[format])
    return found.reshape(len(rows), -1)


def _with_minima(blocks: Floats, bits: int) -> Bytes:
    """Q4_K or Q5_K: ``d * scale * q - dmin * minimum``, in blocks of 32."""
    x = blocks.reshape(len(blocks), 8, 32)
    scales, minima = _fit(x, 2**bits - 1)
    d, ls = _six_bits(scales)
    dmin, lm = _six_bits(minima)
    step = d.astype(np.float32)[:, None] * ls
    offset = dmin.astype(np.float32)[:, None] * lm
    q = np.rint((x + offset[..., None]) / np.maximum(step, _TINY)[..., None])
    q = np.clip(q, 0, 2**bits - 1).astype(np.uint8)
    packed = np.zeros((len(blocks), 12), np.uint8)
    packed[:, 0:4] = ls[:, :4] | (ls[:, 4:] >> 4) << 6
    packed[:, 4:8] = lm[:, :4] | (lm[:, 4:] >> 4) << 6
    packed[:, 8:12] = ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4
    pairs = q.reshape(len(blocks), 4, 2, 32)
    low = ((pairs[:, :, 0] & 15) | (pairs[:, :, 1] & 15) << 4).reshape(len(blocks), 128)
    head = [d[:, None].view(np.uint8), dmin[:, None].view(np.uint8), packed]
    if bits == 5:
        places = np.arange(8, dtype=np.uint8)[:, None]
        head.append(np.bitwise_or.reduce((q >> 4) << places, axis=1))
    return np.concatenate([*head, low], axis=1)


def _fit(x: Floats, largest: int) -> tuple[Floats, Floats]:
    """The scale and the negative minimum of each block, ``[super-blocks, 8]``."""
    weights = np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + np.abs(x)
    least = np.minimum(x.min(axis=-1, keepdims=True), 0)
    span = np.maximum(x.max(axis=-1, keepdims=True) - least, _TINY)
    sum_w, sum_x = weights.sum(-1), (weights * x).sum(-1)
    best = np.full(x.shape[:-1], np.inf, np.float32)
    scale, minimum = np.zeros_like(best), np.zeros_like(best)
    for step in np.linspace(-1.0, 1.0, 11, dtype=np.float32):
        q = np.clip(np.rint((largest + step) / span * (x - least)), 0, largest)
        wq = weights * q
        sum_q, sum_qq, sum_xq = wq.sum(-1), (wq * q).sum(-1), (wq * x).sum(-1)
        determinant = sum_w * sum_qq - sum_q * sum_q
        # Where all numbers are alike, or the minimum would be positive, one of the two is enough.
        line = determinant > 1e-4 * sum_w * sum_qq
        determinant = np.where(line, determinant, 1)
        b = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        line &= b <= 0
        a = (sum_w * sum_xq - sum_x * sum_q) / determinant
        a = np.where(line, a, sum_xq / np.maximum(sum_qq, _TINY))
        # All at the lower end: a minimum only.
        alone = np.where(sum_q == 0, np.minimum(sum_x / np.maximum(sum_w, _TINY), 0), 0)
        b = np.where(line, b, alone)
        error = (weights * (a[..., None] * q + b[..., None] - x) ** 2).sum(-1)
        better = (error < best) & (a >= 0)
        best = np.where(better, error, best)
        scale, minimum = np.where(better, a, scale), np.where(better, b, minimum)
    return scale, -minimum


def _six_bits(values: Floats) -> tuple[Array, Array]:
    """Positive values as a float16 for each super-block, times integers of 6 bits."""
    unit = (values.max(axis=-1) / 63).astype(np.float16)
    steps = np.rint(values / np.maximum(unit.astype(np.float32), _TINY)[:, None])
    return unit, np.clip(steps, 0, 63).astype(np.uint8)


def _q6_k(blocks: Floats) -> Bytes:
    """Q6_K: ``d * scale * (q - 32)``, in blocks of 16."""
    x = blocks.reshape(len(blocks), 16, 16)
    place = np.abs(x).argmax(axis=-1)[..., None]
    # The largest number has the sign of -32, the larger end of the range.
    peak = np.take_along_axis(x, place, -1)
    peak = np.where(np.abs(peak) < _TINY, _TINY, peak)
    weights = x * x
    best, scale = np.full(x.shape[:-1], -np.inf, np.float32), np.zeros(x.shape[:-1], np.float32)
    for step in np.linspace(-0.9, 0.9, 7, dtype=np.float32):
        q = np.clip(np.rint(-(32 + step) / peak * x), -32, 31)
        sum_xq, sum_qq = (weights * x * q).sum(-1), (weights * q * q).sum(-1)
        fit = sum_xq / np.maximum(sum_qq, _TINY)
        better = fit * sum_xq > best
        best = np.where(better, fit * sum_xq, best)
        scale = np.where(better, fit, scale)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)
    d = (largest / -128).astype(np.float16)
    unit = np.where(d == 0, 1, d.astype(np.float32))
    steps = np.clip(np.rint(scale / unit), -128, 127).astype(np.int8)
    each = (unit * steps)[..., None]
    q = np.clip(np.rint(x / np.where(each == 0, 1, each)), -32, 31).astype(np.int8) + 32
    quarters = q.astype(np.uint8).reshape(len(blocks), 2, 4, 32)
    low = [quarters[:, :, i] & 15 | (quarters[:, :, i + 2] & 15) << 4 for i in (0, 1)]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = np.bitwise_or.reduce((quarters >> 4) << shifts, axis=2)
    return np.concatenate(
        [
            np.stack(low, axis=2).reshape(len(blocks), 128),
            high.reshape(len(blocks), 64),
            steps.view(np.uint8),
            d.view(np.uint8),
        ],
        axis=1,
    )
