"""Time of a CPU's steps: XLA's products and attention against the native kernels'.

    python -m tests.accelerators.bench_cpu_steps
    python -m tests.accelerators.bench_cpu_steps --rows 1,32 --live 500
    INFERNEO_CHECKPOINTS=folder MODEL=name python -m tests.accelerators.bench_cpu_steps

Prints the median milliseconds of one decode step for each number of rows, of prefilling 512 tokens
in chunks of 256, and of the products of one layer and the vocabulary, all in this process. Leave
the machine alone meanwhile.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.layers.sampler import Sampling
from inferneo_jax.model import load_weights
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.programs import (
    Decode,
    EmptyCache,
    Forward,
    Prefill,
    Programs,
    Sample,
    dispatch_forward,
    dispatch_sample,
)
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.weights.catalog import checkpoint_path, default_checkpoints_dir
from inferneo_jax.weights.checkpoint import open_weights, read_info
from inferneo_jax.weights.sources.weight import block_formats

MODEL = "smollm2-135m-instruct"
WAYS: dict[str, dict[str, Any]] = {"xla": {"kernels": "xla"}, "native": {}}
MAX_LEN = 1024


def median(run: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call, from as many as fit into some seconds."""
    jax.block_until_ready(run())
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def load(way: dict[str, Any], rows: tuple[int, ...]) -> tuple[Programs, list[jax.Array]]:
    """The programs and weights of one way to compute."""
    config = EngineConfig(
        slots=max(rows),
        max_len=MAX_LEN,
        kv_tokens=max(rows) * MAX_LEN,
        row_buckets=rows,
        prefill_chunks=(256,),
        mesh=MeshShape(1, 1),
        **way,
    )
    folder = Path(os.environ.get("INFERNEO_CHECKPOINTS") or default_checkpoints_dir())
    info = read_info(checkpoint_path(folder, os.environ.get("MODEL", MODEL)))
    mesh = make_mesh(config.mesh)
    shapes = {name: spec.shape for name, spec in models.weight_specs(info.config).items()}
    stored = open_weights(info.path, shapes)
    assert isinstance(info.config, DecoderConfig)
    backend = resolve_decoder(info.config, config, mesh, block_formats(stored))
    return make_programs(backend, config, lambda: 0), load_weights(stored, backend)


class Steps:
    """Steps of one way, on a cache that they write to."""

    def __init__(self, programs: Programs, weights: list[jax.Array]) -> None:
        self.programs, self.weights = programs, weights
        self.cache = programs.lower(EmptyCache(draft=False)).compile()()
        empty = programs.inputs.empty_state()
        shape, size = empty.block_tables.shape, empty.block_tables.size
        self.block_tables = np.arange(1, 1 + size, dtype=np.int32).reshape(shape)
        self.state = empty._replace(block_tables=self.block_tables.copy())

    def arguments(self, key: Forward, **fields: Any) -> Any:
        """All rows at work, each in pages of its own."""
        (inputs,) = self.programs.host_arguments(key)
        slots = np.arange(len(inputs.slots), dtype=np.int32)
        if "positions" in fields:
            index = fields["positions"][:, None] // self.programs.page_len
            index = index + np.arange(inputs.pages.shape[1])
            fields["pages"] = self.block_tables[slots[:, None], index]
        return inputs._replace(slots=slots, **fields)

    def compiled(self, key: Forward) -> tuple[Any, Any]:
        """A program, and the one that samples the most likely tokens of what it computes."""
        sample = Sample(self.programs.sampled_rows(key), Sampling.GREEDY)
        return self.programs.lower(key).compile(), self.programs.lower(sample).compile()

    def run(self, compiled: tuple[Any, Any], *arguments: Any) -> Any:
        """One call for each of the arguments."""
        program, sample = compiled
        for each in arguments:
            self.cache, self.state, to_sample, *_ = dispatch_forward(
                program, self.weights, self.cache, self.state, each
            )
            self.state, ids = dispatch_sample(sample, self.state, to_sample)
        return ids

    def decode(self, rows: int, live: int, seconds: float) -> float:
        """Milliseconds of a step that gives each row its next token."""
        key = Decode(rows)
        positions = np.full(rows, live, np.int32)
        rows_at_work = self.arguments(key, positions=positions)
        return median(partial(self.run, self.compiled(key), rows_at_work), seconds)

    def prefill(self, seconds: float) -> float:
        """Milliseconds for 512 tokens of one prompt."""
        key = Prefill(1, 256)
        length, last = np.full(1, 256, np.int32), np.ones(1, bool)
        chunks = [
            self.arguments(key, start=np.full(1, start, np.int32), length=length, last=last)
            for start in (0, 256)
        ]
        return median(partial(self.run, self.compiled(key), *chunks), seconds)


def products(programs: Programs, rows: int, seconds: float) -> list[float]:
    """Milliseconds of the products of one layer (qkv, out, gate and up, down) and of the head."""
    specs = models.weight_specs(programs.backend.padded, programs.backend.quantization)
    matrices = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    found = []
    for name in (
        *(f"layers.0.{matrix}.kernel" for matrix in matrices),
        "head.kernel" if "head.kernel" in specs else "embed.table",
    ):
        spec = specs[name]
        # As many copies as no cache holds, as a step finds them.
        size = sum(int(np.prod(p.shape)) * p.dtype.itemsize for p in spec.parameters)
        stored = [
            tuple(jnp.zeros(p.shape, p.dtype) for p in spec.parameters)
            for _ in range(max(1, 64_000_000 // size))
        ]
        x = jnp.ones((rows, spec.flat_shape[int(spec.table)]))
        multiply = jax.jit(
            lambda x, all_stored, spec=spec: [
                spec.method.product(x, s, table=spec.table) for s in all_stored
            ]
        )
        found.append(median(partial(multiply, x, stored), seconds) / len(stored))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    parser.add_argument("--live", type=int, default=200, help="positions of each row before")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    options = parser.parse_args()
    rows = tuple(int(each) for each in options.rows.split(","))
    made = {name: Steps(*load(way, rows)) for name, way in WAYS.items()}
    print(f"{'ms':>24}", *(f"{name:>10}" for name in made))
    for count in rows:
        times = [each.decode(count, options.live, options.seconds) for each in made.values()]
        print(f"{f'decode, {count} rows':>24}", *(f"{value:10.2f}" for value in times))
    times = [each.prefill(options.seconds) for each in made.values()]
    print(f"{'prefill, 512 tokens':>24}", *(f"{value:10.2f}" for value in times))
    for count in sorted({rows[0], rows[-1], 256}):
        parts = [products(each.programs, count, options.seconds / 5) for each in made.values()]
        for name, *values in zip(("qkv", "out", "gate, up", "down", "head"), *parts, strict=True):
            print(f"{f'{name}, {count} rows':>24}", *(f"{value:10.3f}" for value in values))


if __name__ == "__main__":
    main()
