"""Speed of the CPU's products with each block format, beside that of reading memory.

    python -m tests.accelerators.bench_cpu_blocks
    python -m tests.accelerators.bench_cpu_blocks --formats q4_k,q6_k --rows 1,256 --variant avx2

Each product is with matrices that no cache holds, of random bytes. Prints their bytes and the
multiplications, each per second, of all cores together. Leave the machine alone meanwhile.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inferneo_jax.kernels.cpu.linear import FORMATS, BlockQuantized
from inferneo_jax.layers.blocks import BlockPart, BlockRows
from tests.support.block_files import random_rows

BYTES = 200_000_000
"""Of the matrices that one call multiplies by."""


def seconds(run: Callable[[], Any]) -> float:
    """The least time of several calls."""
    jax.block_until_ready(run())
    times = []
    for _ in range(7):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,2,4,16,64,256")
    parser.add_argument("--inputs", type=int, default=1536)
    parser.add_argument("--outputs", type=int, default=8960)
    parser.add_argument("--variant", default="native", choices=("native", "avx2", "portable"))
    options = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(1024, options.inputs)).astype(np.float32)
    source = jnp.zeros(BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    read = seconds(lambda: total(source))
    print(f"reading memory: {BYTES / read / 1e9:.1f} GB/s")
    for name in options.formats.split(","):
        rows = random_rows(name, options.outputs, options.inputs)
        part = BlockPart(name, ((0, options.outputs),))
        method = BlockQuantized(jnp.dtype("float32"), (part,), options.variant)
        (encoded,) = method.encode_blocks((BlockRows(part, (rows,)),))
        copies = -(-BYTES // encoded.nbytes)
        stored = [(jnp.array(encoded, copy=True),) for _ in range(copies)]
        multiply = jax.jit(
            lambda x, stored, method=method: [
                method.multiply(x, each, options.outputs) for each in stored
            ]
        )
        for count in map(int, options.rows.split(",")):
            taken = seconds(lambda n=count, f=multiply, stored=stored: f(x[:n], stored)) / copies
            multiplied = options.inputs * options.outputs * count
            print(
                f"{name:>8} {count:5} rows {taken * 1e3:9.3f} ms"
                f" {encoded.nbytes / taken / 1e9:8.1f} GB/s {multiplied / taken / 1e9:8.0f} GMAC/s"
            )


if __name__ == "__main__":
    main()
