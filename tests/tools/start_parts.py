"""The parts of a start, one after the other: ``python -m tests.tools.start_parts CHECKPOINT``.

A server does most of them at once, so their seconds do not add up to those of a start. The seconds
of processors do, and other work on the machine changes them little.
"""

import importlib
import sys
import time
from pathlib import Path

import psutil


def main(path: Path) -> None:
    """Print the seconds of processors, of the clock, and the memory in MiB after each part."""
    process = psutil.Process()

    def now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    last = 0.0, time.perf_counter()

    def report(part: str) -> None:
        nonlocal last
        cpu, clock = now()
        memory = process.memory_info().rss / 2**20
        print(f"{part:28}{cpu - last[0]:8.2f}{clock - last[1]:8.2f}{memory:8.0f}", flush=True)
        last = now()

    print(f"{'':28}{'CPU s':>8}{'s':>8}{'MiB':>8}")
    for name in ("server.cli.main", "server.application", "jax", "inferneo_jax.model"):
        importlib.import_module(name)
        report(f"import {name}")

    from inferneo_jax import model as loading
    from inferneo_jax.config import DecoderConfig
    from inferneo_jax.kernels.cpu.build import library
    from inferneo_jax.platform.memory import malloc_trim
    from inferneo_jax.runner.backends import resolve_decoder
    from inferneo_jax.runner.runner import Runner
    from inferneo_jax.sharding.mesh import make_mesh
    from inferneo_jax.text.tokenizer import Tokenizer
    from inferneo_jax.weights.checkpoint import read_info
    from inferneo_jax.weights.sources.weight import block_formats
    from server.config.settings import Settings

    config = Settings.load({}).engine_config()
    library()
    report("kernels")
    tokenizer = Tokenizer.from_directory(path)
    report("tokenizer")
    info = read_info(path)
    assert isinstance(info.config, DecoderConfig)
    stored = loading._open(info)
    backend = resolve_decoder(info.config, config, make_mesh(config.mesh), block_formats(stored))
    runner = Runner(backend, config)
    report("shapes")
    with loading.compiles.expected():
        runner.compile()
        report("first programs")
        weights = loading.load_weights(stored, backend)
        report("weights")
        runner.place(weights)
        runner.warm_up()
    report("cache, warm-up")
    malloc_trim()
    report("ready")
    runner.compile_rest()
    report("the other programs")
    del tokenizer


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
