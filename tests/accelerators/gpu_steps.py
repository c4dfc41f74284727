"""Stage ``steps`` of ``gpu.py``: the time of decode and prefill of an 8B model, without a server.

Weights are random and made on the device. Every row has pages of its own, in random order.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.layers.sampler import Sampling, sampling_of
from inferneo_jax.models.steps import SlotState
from inferneo_jax.planner.budget import work_of
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.programs import (
    Decode,
    EmptyCache,
    Forward,
    Prefill,
    Sample,
    dispatch_forward,
    dispatch_sample,
)
from inferneo_jax.sharding import mesh as meshes
from tests.accelerators.gpu import Report

LLAMA_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    mlp_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    context_length=131_072,
    rope_theta=500_000.0,
)
TOY = DecoderConfig(
    vocab_size=512,
    hidden_size=64,
    mlp_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    context_length=4096,
)
_KINDS = "fusion|custom-call|dot|reduce|sort|copy|scatter|gather|dynamic-update-slice|while"
_LAUNCHES = re.compile(rf" (?:{_KINDS}|conditional)\(")
"""Instructions of a compiled program that each run a kernel, or several."""
CHAINS, CHAINED = 5, 10
"""Measurements, and steps of each, which are dispatched without waiting."""


def copy_rate(num_bytes: int) -> float:
    """Bytes per second that the device's memory reads and writes, by adding one to an array."""
    array = jnp.zeros(num_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(add(array))
    started, times = time.perf_counter(), 20
    for _ in range(times):
        array = add(array)
    jax.block_until_ready(array)
    return 2 * num_bytes * times / (time.perf_counter() - started)


@partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return jax.random.randint(key, shape, limits.min, limits.max, dtype)
    if dtype == jnp.float32:  # scales
        return jnp.full(shape, 0.01, dtype)
    return 0.02 * jax.random.normal(key, shape, dtype)


class Steps:
    """Compiled steps over random weights, and the cache and the slots that they work on.

    Args:
        model: its shape.
        config: of the engine, with ``slots`` and ``max_len``.
        live: tokens of every row; slot 0 has room for ``max_len``.
    """

    def __init__(self, model: DecoderConfig, config: EngineConfig, live: int) -> None:
        mesh = meshes.make_mesh(config.mesh)
        backend = resolve_decoder(model, config, mesh, {})
        page_len = backend.attention.page_len
        assert config.max_len
        pages = [-(-config.max_len // page_len)] + [live // page_len + 1] * (config.slots - 1)
        config = dataclasses.replace(config, kv_tokens=sum(pages) * page_len)
        self.programs = make_programs(backend, config, lambda: 0)
        keys = jax.random.split(jax.random.key(0), len(self.programs.weights))
        self.weights = [
            _draw(key, each.shape, each.dtype)
            for key, each in zip(keys, self.programs.weights, strict=True)
        ]
        self.cache = self.programs.lower(EmptyCache(draft=False)).compile()()
        empty = self.programs.inputs.empty_state()
        self.tables = np.zeros_like(empty.block_tables)
        rest = np.random.default_rng(0).permutation(np.arange(1, sum(pages) + 1))
        for table, count in zip(self.tables, pages, strict=True):
            table[:count], rest = rest[:count], rest[count:]
        self._empty = empty._replace(block_tables=self.tables)
        self._sharding = NamedSharding(mesh, meshes.spec("slots"))
        self.state: SlotState
        self.sample_with()
        self._compiled: dict[Any, Any] = {}
        self.facts: dict[Any, dict[str, Any]] = {}

    def sample_with(self, **parameters: float) -> None:
        """Give all slots these sampling parameters, greedy by default."""
        sampling = self._empty.sampling
        for name, value in parameters.items():
            array = np.full_like(getattr(sampling, name), value)
            sampling = sampling._replace(**{name: array})
        self._kind = Sampling(sampling_of(sampling, self.programs.inputs.vocab_size).max())
        self.state = jax.device_put(self._empty._replace(sampling=sampling), self._sharding)

    def _program(self, key: Any) -> Any:
        if key not in self._compiled:
            started = time.perf_counter()
            compiled = self.programs.lower(key).compile()
            seconds = time.perf_counter() - started
            entry = compiled.as_text().split("\nENTRY")[-1]
            self.facts[key] = {
                "kernels": len(_LAUNCHES.findall(entry)),
                "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                "compile_s": seconds,
            }
            self._compiled[key] = compiled
        return self._compiled[key]

    def run(self, key: Forward, inputs: Any) -> Any:
        """Dispatch one step: the forward pass, and sampling after it."""
        program, sample = map(self._program, self._keys(key))
        self.cache, self.state, to_sample, *_ = dispatch_forward(
            program, self.weights, self.cache, self.state, inputs
        )
        self.state, ids = dispatch_sample(sample, self.state, to_sample)
        return ids

    def _keys(self, key: Forward) -> tuple[Forward, Sample]:
        return key, Sample(self.programs.sampled_rows(key), self._kind)

    def decode(self, lengths: list[int]) -> tuple[Decode, Any]:
        """A decode step and its inputs: a row for each number of live tokens."""
        key = Decode(len(lengths))
        (inputs,) = self.programs.host_arguments(key)
        slots = np.arange(len(lengths), dtype=np.int32)
        positions = np.array(lengths, np.int32) - 1
        pages = self.tables[slots, positions // self.programs.page_len][:, None]
        return key, inputs._replace(slots=slots, positions=positions, pages=pages)

    def prefill(self, tokens: int) -> tuple[Prefill, Any]:
        """A step that prefills a prompt of ``tokens``, which a program is compiled for."""
        key = Prefill(1, tokens)
        (inputs,) = self.programs.host_arguments(key)
        one = {"slots": np.zeros(1, np.int32), "length": np.full(1, tokens, np.int32)}
        return key, inputs._replace(**one)

    def time(self, key: Forward, inputs: Any) -> tuple[float, float]:
        """Seconds of a step on the device, and those after which its dispatch returns: medians."""
        for _ in range(2):
            jax.block_until_ready(self.run(key, inputs))
        whole, host = [], []
        for _ in range(CHAINS):
            started = time.perf_counter()
            for _ in range(CHAINED):
                sampled = self.run(key, inputs)
            dispatched = time.perf_counter()
            jax.block_until_ready(sampled)
            whole.append((time.perf_counter() - started) / CHAINED)
            host.append((dispatched - started) / CHAINED)
        return statistics.median(whole), statistics.median(host)

    def figures(self, key: Forward, inputs: Any, live: int, rate: float) -> dict[str, Any]:
        """The time of a step, and what there is to compare it with.

        Args:
            key: of the forward pass.
            inputs: of it.
            live: mean number of positions that a token attends to.
            rate: bytes per second of the memory.
        """
        seconds, host = self.time(key, inputs)
        tokens = key.tokens if isinstance(key, Prefill) else 1
        part = key.rows, tokens
        work = work_of(self.programs.backend, live, self.programs.token_bytes, part)
        num_bytes = work.weights + work.live_kv
        parts = [self.facts[each] for each in self._keys(key)]
        return {
            "ms": 1e3 * seconds,
            "host_ms": 1e3 * host,
            "gb": num_bytes / 1e9,
            "floor_ms": 1e3 * num_bytes / rate,
            "share": num_bytes / rate / seconds,
            "tflops": work.operations / seconds / 1e12,
            **{name: sum(part[name] for part in parts) for name in parts[0]},
        }


def longest_kernels(trace: Path, count: int = 15) -> list[tuple[str, float, int]]:
    """The kernels of a profile that take longest: name, milliseconds, how often."""
    found: dict[str, tuple[float, int]] = {}
    (file, *_) = sorted(trace.rglob("*.xplane.pb"))
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                total, times = found.get(event.name, (0.0, 0))
                found[event.name] = (total + event.duration_ns / 1e6, times + 1)
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return [(name[:80], *times) for name, times in ordered[:count]]


def run(report: Report) -> None:
    """Measure all steps, in bfloat16 and in int8."""
    dry = report.dry
    report.figure("device", kind=jax.devices()[0].device_kind, jax=jax.__version__)
    measured = report.run("copy", copy_rate, 2**24 if dry else 2**30)
    rate = measured or 3e12
    report.figure("copy", gb_s=rate / 1e9)
    for name, fields in {
        "bf16": {"dtype": "bfloat16", "quantization": "none"},
        "int8": {"dtype": "bfloat16", "quantization": "int8", "kv_dtype": "int8"},
    }.items():
        report.run(name, partial(_measure, report, name, fields, rate))


def _measure(report: Report, name: str, fields: dict[str, Any], rate: float) -> None:
    dry = report.dry
    live, longest = (32, 512) if dry else (1024, 102_400)
    buckets, chunks = ((2, 4), (16, 32)) if dry else ((2, 16, 64, 256), (256, 1024, 2048))
    config = EngineConfig(
        slots=buckets[-1],
        max_len=longest,
        row_buckets=buckets,
        prefill_chunks=chunks,
        mesh=MeshShape(1, 1),
        speculation="off",
        **fields,
    )
    started = time.perf_counter()
    steps = Steps(TOY if dry else LLAMA_8B, config, live + CHAINED)
    jax.block_until_ready(steps.weights)
    report.figure(f"{name} weights", seconds=time.perf_counter() - started)
    wanted = 0.7 if name == "bf16" else 0.6

    def decode(label: str, lengths: list[int], judge: Callable[[dict[str, Any]], bool]) -> None:
        key, inputs = steps.decode(lengths)
        mean = sum(lengths) // len(lengths)
        figures = steps.figures(key, inputs, mean, rate)
        report.figure(label, report.judged(judge(figures)), **figures)

    for rows in buckets:
        enough = lambda found, rows=rows: rows > 64 or found["share"] >= wanted  # noqa: E731
        label = f"{name} decode {rows} rows"
        report.run(label, decode, label, [live] * rows, enough)
    some = buckets[-2]
    lengths = [longest - 100] + [live] * (some - 1)
    label = f"{name} decode {some} rows, one long"
    report.run(label, decode, label, lengths, lambda found: found["share"] >= wanted / 2)
    for tokens in chunks:
        label = f"{name} prefill {tokens}"
        report.run(label, _prefill, report, label, steps, tokens, rate)
    if name == "bf16":
        report.run("profile", _profile, report, steps, [live] * some)
    steps.sample_with(temperature=1.0, top_p=0.9, top_k=50)
    for rows in buckets:
        label = f"{name} decode {rows} rows, sampled"
        report.run(label, decode, label, [live] * rows, lambda _: True)


def _prefill(report: Report, label: str, steps: Steps, tokens: int, rate: float) -> None:
    key, inputs = steps.prefill(tokens)
    figures = steps.figures(key, inputs, tokens // 2, rate)
    enough = tokens != 1024 or "bf16" not in label or figures["tflops"] >= 350
    report.figure(label, report.judged(enough), **figures)


def _profile(report: Report, steps: Steps, lengths: list[int]) -> None:
    key, inputs = steps.decode(lengths)
    folder = report.folder / "profile"
    jax.block_until_ready(steps.run(key, inputs))
    with jax.profiler.trace(str(folder)):
        for _ in range(3):
            jax.block_until_ready(steps.run(key, inputs))
    kernels = longest_kernels(folder)
    report.figure("profile", report.judged(bool(kernels)), kernels=len(kernels))
    for kernel, milliseconds, times in kernels:
        report.figure(f"kernel {kernel[:36]}", ms=milliseconds, times=times, kernel=kernel)
