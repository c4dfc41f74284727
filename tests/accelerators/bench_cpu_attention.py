"""Attention of one layer on this CPU: XLA's operations against the native kernels, in one run.

Every layer has pages of its own, as in a model, so that keys and values come from memory and not
from caches; each layer's call waits for the one before. Writing and rotary embedding are included.

    python -m tests.accelerators.bench_cpu_attention

Options give another model's heads. Times are medians, in microseconds a layer, the kinds taking
turns; the fastest run is in brackets.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inferneo_jax.kernels.cpu.attention import CpuPagedAttention
from inferneo_jax.layers import rope
from inferneo_jax.layers.cache import AttentionMetadata, PagedAttention

KINDS = {
    "xla float32": (PagedAttention, "float32"),
    "native float32": (CpuPagedAttention, "float32"),
    "native bfloat16": (CpuPagedAttention, "bfloat16"),
    "native int8": (CpuPagedAttention, "int8"),
}
STEPS = [(1, 1, 255), (16, 1, 255), (32, 1, 255), (1, 1, 2047), (1, 256, 0), (1, 256, 256)]
"""Rows, new tokens of each, and tokens before these."""


def runs(kind: str, step: tuple[int, int, int], args: argparse.Namespace) -> Callable[[], float]:
    """A function that runs all layers once and returns the seconds that one took."""
    rows, tokens, start = step
    make, dtype = KINDS[kind]
    attention = make(args.kv_heads, args.head_dim, 16, jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    max_pages = -(-(start + tokens) // 16)
    block_tables = rng.permutation(np.arange(1, rows * max_pages + 1)).reshape(rows, max_pages)
    positions = np.full((rows, 1), start) + np.arange(tokens)
    metadata = AttentionMetadata(
        jnp.asarray(block_tables, jnp.int32), jnp.asarray(positions, jnp.int32)
    )
    freqs = jnp.asarray(rope.frequencies(args.head_dim, 1e4, None))
    shape = (rows, tokens, args.kv_heads, args.group + 2, args.head_dim)
    fused = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def layers(cache: Any) -> tuple[jax.Array, Any]:
        cos, sin = rope.angles(metadata.positions, freqs)
        written = []
        for layer in cache:
            mixed, layer = attention.step(fused, (cos, sin), layer, metadata)
            cos = cos + 0 * mixed[:1, :1, 0, 0, :1]
            written.append(layer)
        return mixed, written

    model: Any = SimpleNamespace(num_layers=args.layers)
    compiled = jax.jit(layers, donate_argnums=0)
    held = [jax.jit(lambda: attention.init(model, rows * max_pages + 1))()]

    def run() -> float:
        began = time.perf_counter()
        mixed, held[0] = compiled(held[0])
        mixed.block_until_ready()
        return (time.perf_counter() - began) / args.layers

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"layers": 30, "kv-heads": 3, "group": 3, "head-dim": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line")
    args = parser.parse_args()
    print(f"{'':24}" + "".join(f"{kind:>22}" for kind in KINDS))
    for step in STEPS:
        kinds = [runs(kind, step, args) for kind in KINDS]
        found: list[list[float]] = [[] for _ in kinds]
        until = time.perf_counter() + args.seconds
        while time.perf_counter() < until:
            for times, run in zip(found, kinds, strict=True):
                times.append(run() * 1e6)
        cells = (f"{statistics.median(times):.0f} ({min(times):.0f})" for times in found)
        rows, tokens, start = step
        label = f"{rows} x {tokens} after {start}"
        print(f"{label:24}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
