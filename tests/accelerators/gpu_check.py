"""Stage ``check`` of ``gpu.py``: whether what a GPU computes is right.

    python -m tests.accelerators.gpu_check CHECKPOINTS FILE

writes the answers of the tiny models of a folder, computed by the reference; the stage runs it on
the CPU, in a process of its own.
"""

import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inferneo_jax import GenerationRequest, SamplingParams
from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.engine.served import LanguageModel
from inferneo_jax.kernels import attention_for
from inferneo_jax.kernels.gpu.attention import GpuPagedAttention
from inferneo_jax.layers.cache import AttentionMetadata, LayerCache, PagedAttention
from inferneo_jax.layers.quantization import quantize
from inferneo_jax.model import load_model
from inferneo_jax.platform.memory import free_memory
from inferneo_jax.weights.convert import convert
from tests.accelerators.gpu import Report
from tests.accelerators.gpu_steps import CHAINED, LLAMA_8B, TOY, Steps, copy_rate
from tests.support.paths import FAMILIES, ROOT

TOKENS = 64
"""Generated for each request to a tiny model."""
DECODERS = ("llama-tied", "llama-untied", "phi3", "qwen2", "qwen3")
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.7, "top_k": 9, "min_p": 0.02, "seed": 2},
    {
        "temperature": 0.0,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.3,
        "logit_bias": {3: 2.0, 90: -100.0},
    },
)
PAGE_LEN, KV_HEADS, GROUP = 16, 2, 4


def answers(folder: Path, kernels: Any) -> list[dict[str, Any]]:
    """What a model answers to requests that run at once, in float32.

    Returns:
        For each request its ``tokens`` and their ``logprobs``; last, what was compiled after ready.
    """
    config = EngineConfig(
        slots=4,
        kv_tokens=4 * 256,
        row_buckets=(4,),
        prefill_chunks=(32,),
        dtype="float32",
        quantization="none",
        kernels=kernels,
        speculation="off",
        mesh=MeshShape(1, 1),
        compilation_cache=os.environ.get("CACHE"),
    )
    model = load_model(folder, config, name=folder.name)
    assert isinstance(model, LanguageModel)
    try:
        if model.compiling:
            model.compiling.join()
        queues = []
        for number, sampling in enumerate(SAMPLED):
            outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
            prompt = np.random.default_rng(number).integers(0, 256, 40 + number)
            request = GenerationRequest(
                id=str(number),
                prompt=tuple(prompt.tolist()),
                max_tokens=TOKENS,
                sampling=SamplingParams(**sampling),
                logprobs=1,
            )
            model.engine.submit(request, outputs.put)
            queues.append(outputs)
        found = [_collect(outputs) for outputs in queues]
        return [*found, {"compiled": model.engine.stats().compiles_after_ready}]
    finally:
        model.stop()


def _collect(outputs: "queue.SimpleQueue[Any]") -> dict[str, Any]:
    tokens: list[int] = []
    logprobs: list[float] = []
    while True:
        output = outputs.get(timeout=120)
        tokens += output.token_ids
        logprobs += [each.logprob for each in output.logprobs or ()]
        if output.finish_reason:
            assert output.finish_reason == "length", output
            return {"tokens": tokens, "logprobs": logprobs}


def _check_families(report: Report, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        convert(FAMILIES / name, folder / name)
    reference = folder / "answers.json"
    command = [sys.executable, "-m", "tests.accelerators.gpu_check", str(folder), str(reference)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        got = {name: report.run(name, answers, folder / name, "auto") for name in names}
        status = process.wait(timeout=300)
        if status:
            raise RuntimeError(f"the reference ended with status {status}")
    wanted = json.loads(reference.read_text())
    for name, found in got.items():
        if found is not None:
            _compare(report, name, found, wanted[name])


def _compare(report: Report, name: str, got: list[Any], want: list[Any]) -> None:
    pairs = list(zip(got[:-1], want[:-1], strict=True))
    equal = [(a, b) for a, b in pairs if a["tokens"] == b["tokens"]]
    worst = max(
        (abs(x - y) for a, b in equal for x, y in zip(a["logprobs"], b["logprobs"], strict=True)),
        default=math.inf,
    )
    compiled = got[-1]["compiled"]
    report.figure(f"{name}: tokens", len(equal) == len(pairs), equal=len(equal), of=len(pairs))
    report.figure(f"{name}: log probabilities", worst <= 1e-4, worst=worst)
    report.figure(f"{name}: compiled after ready", compiled == 0, programs=compiled)


def _attention(head_dim: int, dtype: Any, *, dry: bool) -> PagedAttention:
    if dry:
        return GpuPagedAttention(KV_HEADS, head_dim, PAGE_LEN, dtype, interpret=True)
    kind = attention_for(jax.devices()[0], "native", head_dim=head_dim, page_len=PAGE_LEN)
    return kind(KV_HEADS, head_dim, PAGE_LEN, dtype)


def _check_attention(
    report: Report, head_dim: int, dtype: Any, tokens: int, lengths: tuple[int, ...]
) -> None:
    """Attend over pages in random order, of which places that no row reads hold no numbers."""
    rng = np.random.default_rng(head_dim + tokens)
    lengths = tuple(max(length, tokens) for length in lengths)
    most = -(-max(lengths) // PAGE_LEN)
    order = rng.permutation(np.arange(1, len(lengths) * most + 1)).reshape(len(lengths), most)
    tables = np.zeros_like(order)
    shape = (order.size + 1, KV_HEADS, PAGE_LEN, head_dim)
    live = np.zeros((shape[0], 1, PAGE_LEN, 1), bool)
    for row, length in enumerate(lengths):
        pages = -(-length // PAGE_LEN)
        tables[row, :pages] = order[row, :pages]
        seen = np.arange(length)
        live[tables[row, seen // PAGE_LEN], 0, seen % PAGE_LEN] = True
    (keys, key_scales, key_numbers), (values, value_scales, value_numbers) = (
        _stored(rng.normal(size=shape), dtype, live) for _ in range(2)
    )
    positions = np.array(lengths)[:, None] - tokens + np.arange(tokens)
    queries = np.float32(rng.normal(size=(len(lengths), tokens, KV_HEADS, GROUP, head_dim)))
    got = jax.jit(_attention(head_dim, dtype, dry=report.dry).attend)(
        jnp.asarray(queries),
        LayerCache(keys, values, key_scales, value_scales),
        AttentionMetadata(jnp.asarray(tables, jnp.int32), jnp.asarray(positions, jnp.int32)),
    )
    worst = 0.0
    for row, length in enumerate(lengths):
        pages = tables[row, : -(-length // PAGE_LEN)]
        key, value = (
            each[pages].transpose(1, 0, 2, 3).reshape(KV_HEADS, -1, head_dim)[:, None, :length]
            for each in (key_numbers, value_numbers)
        )
        heads = queries[row].astype(np.float64).transpose(1, 2, 0, 3)
        scores = heads @ key.swapaxes(-1, -2) / np.sqrt(head_dim)
        scores[..., np.arange(length)[None, :] > positions[row][:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want = (weights / weights.sum(-1, keepdims=True) @ value).transpose(2, 0, 1, 3)
        error = np.abs(np.asarray(got[row], np.float64) - want).max() / np.abs(want).max()
        worst = max(worst, float(error)) if np.isfinite(error) else math.inf
    name = f"attention {head_dim}, {jnp.dtype(dtype).name}, {tokens} tokens"
    report.figure(name, worst <= (1e-5 if dtype == jnp.float32 else 1e-2), error=worst)


def _stored(numbers: np.ndarray, dtype: Any, live: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """Numbers as a cache stores them, their scales, and what these stand for in float64."""
    values = jnp.asarray(numbers, jnp.float32)
    if dtype == jnp.int8:
        codes, scales = quantize(values)
        exact = np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[..., None]
        spoiled = jnp.where(live[..., 0], scales, jnp.nan)
        return jnp.where(live, codes, jnp.int8(-128)), spoiled[:, :, None], exact
    narrow = values.astype(dtype)
    exact = np.asarray(narrow.astype(jnp.float32), np.float64)
    return jnp.where(live, narrow, jnp.asarray(jnp.nan, dtype)), None, exact


def _check_in_place(report: Report, dtype: Any) -> None:
    """Write and attend with a donated cache: it stays where it is."""
    rows, pages, head_dim = 4, 64, 64
    attention = _attention(head_dim, dtype, dry=report.dry)
    model = dataclasses.replace(TOY, num_layers=1, num_kv_heads=KV_HEADS, head_dim=head_dim)
    (cache,) = attention.init(model, pages)
    metadata = AttentionMetadata(
        jnp.arange(1, 1 + rows, dtype=jnp.int32)[:, None], jnp.full((rows, 1), 3, jnp.int32)
    )

    def step(cache: LayerCache, queries: Any, new: Any) -> Any:
        cache = attention.write(cache, new, new, metadata)
        return attention.attend(queries, cache, metadata), cache

    new = jnp.ones((rows, 1, KV_HEADS, head_dim), jnp.float32)
    queries = jnp.ones((rows, 1, KV_HEADS, GROUP, head_dim), jnp.float32)
    before = [each.unsafe_buffer_pointer() for each in jax.tree.leaves(cache)]
    _, cache = jax.jit(step, donate_argnums=0)(cache, queries, new)
    after = [each.unsafe_buffer_pointer() for each in jax.tree.leaves(cache)]
    report.figure(f"cache in place, {jnp.dtype(dtype).name}", before == after, arrays=len(before))


def _check_product(report: Report) -> None:
    size, times = (256, 2) if report.dry else (8192, 20)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, b))
    started = time.perf_counter()
    found = [product(a, b) for _ in range(times)]
    jax.block_until_ready(found)
    seconds = (time.perf_counter() - started) / times
    report.figure("bf16 product", size=size, tflops=2 * size**3 / seconds / 1e12)


def _check_dispatch(report: Report) -> None:
    """Whether the host goes on while the device runs a step."""
    rows, live = (2, 32) if report.dry else (16, 1024)
    config = EngineConfig(
        slots=rows,
        max_len=live + 2 * CHAINED,
        row_buckets=(rows,),
        prefill_chunks=(32,),
        dtype="bfloat16",
        quantization="none",
        speculation="off",
        mesh=MeshShape(1, 1),
    )
    model = TOY if report.dry else dataclasses.replace(LLAMA_8B, num_layers=8)
    steps = Steps(model, config, live + CHAINED)
    seconds, host = steps.time(*steps.decode([live] * rows))
    share = host / seconds
    report.figure("dispatch over step", report.judged(share < 0.3), share=share, ms=1e3 * seconds)


def run(report: Report) -> None:
    """Check everything."""
    dry, device = report.dry, jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    report.figure(
        "device",
        kind=device.device_kind,
        jax=jax.__version__,
        client=device.client.platform_version.splitlines()[0],
        limit_gb=memory and memory / 1e9,
        free_gb=free_memory() / 1e9,
    )
    rate = report.run("copy", copy_rate, 2**24 if dry else 2**30)
    report.figure("copy", gb_s=rate and rate / 1e9)
    report.run("bf16 product", _check_product, report)
    report.run("dispatch", _check_dispatch, report)
    dtypes = [jnp.dtype(name) for name in ("float32", "bfloat16", "int8")]
    for dtype in dtypes:
        report.run(f"cache in place, {dtype.name}", _check_in_place, report, dtype)
    with tempfile.TemporaryDirectory() as folder:
        names = DECODERS[:1] if dry else DECODERS
        report.run("families", _check_families, report, Path(folder), names)
    sizes, counts = ((64,), (1, 6)) if dry else ((64, 80, 96, 128, 256), (1, 6, 256))
    lengths = (1, 40) if dry else (1, 1000, 8000)
    for head_dim in sizes:
        for dtype in dtypes:
            for tokens in counts:
                name = f"attention {head_dim}, {dtype.name}, {tokens} tokens"
                report.run(name, _check_attention, report, head_dim, dtype, tokens, lengths)


if __name__ == "__main__":
    checkpoints, target = Path(sys.argv[1]), Path(sys.argv[2])
    folders = [each for each in sorted(checkpoints.iterdir()) if each.is_dir()]
    target.write_text(json.dumps({each.name: answers(each, "xla") for each in folders}))
