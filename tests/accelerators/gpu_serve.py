"""Stage ``serve`` of ``gpu.py``: an 8B model of random weights, converted and served by our tools.

Its files take 16 GB in the temporary folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from inferneo_jax.config import DecoderConfig
from inferneo_jax.weights.convert import convert
from server.process.child import OURS, Child
from tests.accelerators.gpu import Report
from tests.accelerators.gpu_steps import LLAMA_8B, TOY
from tests.support.model_files import llama_config
from tests.support.paths import FAMILIES, ROOT

_BLOCK = 2**22
_TICKS = os.sysconf("SC_CLK_TCK")


def write_random_model(folder: Path, model: DecoderConfig) -> None:
    """Write a Llama as Hugging Face lays it out, with random weights in bfloat16.

    Its tokenizer has few tokens; the other columns of the vocabulary have none.
    """
    folder.mkdir()
    source = FAMILIES / "llama-untied"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    config |= llama_config(model) | {
        "max_position_embeddings": 8192,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    block = (0.02 * rng.standard_normal(_BLOCK, np.float32)).astype(ml_dtypes.bfloat16)
    files = {}
    for number, shapes in enumerate(_shapes(model)):
        # One block of random numbers, turned each time, fills all: drawing 16 GB takes minutes.
        tensors = {
            name: np.resize(np.roll(block, int(rng.integers(_BLOCK))), shape)
            if len(shape) > 1
            else np.ones(shape, ml_dtypes.bfloat16)
            for name, shape in shapes.items()
        }
        files |= dict.fromkeys(tensors, f"model-{number:05}.safetensors")
        save_file(tensors, folder / f"model-{number:05}.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shapes(model: DecoderConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of a model's tensors, file by file."""
    hidden, mlp = model.hidden_size, model.mlp_size
    heads, kv_heads = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    yield {
        "model.embed_tokens.weight": (model.vocab_size, hidden),
        "lm_head.weight": (model.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(model.num_layers):
        of_layer = {
            "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (kv_heads, hidden),
            "self_attn.v_proj": (kv_heads, hidden),
            "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}


def _bench(report: Report, kind: str, *arguments: str, settings: dict[str, str]) -> list[Any]:
    """The levels that ``inferneo bench`` has measured."""
    file = report.folder / f"bench-{kind}.json"
    command = [sys.executable, "-m", "server.cli", "bench", kind, *arguments, "--json", str(file)]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, check=True, timeout=report.left() + 60
    )
    levels: list[Any] = json.loads(file.read_text())["levels"]
    return levels


def _told(level: dict[str, Any]) -> dict[str, float]:
    """The figures of a level that are compared."""
    told = {"tok_s": level["output_tokens_per_second"]}
    for name in ("ttft", "itl"):
        percentiles = level[name] or {}
        told |= {f"{name}_{p}_ms": 1e3 * percentiles[p] for p in ("p50", "p99") if p in percentiles}
    return told


def _cpu_seconds(process: int) -> float:
    """CPU seconds that a process has used, without its children."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def run(report: Report) -> None:
    """Write the model, and put load on its engine and on a server."""
    with tempfile.TemporaryDirectory() as folder:
        report.run("serve", _serve, report, Path(folder))


def _serve(report: Report, folder: Path) -> None:
    dry = report.dry
    started = time.perf_counter()
    write_random_model(folder / "files", TOY if dry else LLAMA_8B)
    report.figure("written", seconds=time.perf_counter() - started)
    started = time.perf_counter()
    checkpoint = convert(folder / "files", folder / "random-8b")
    report.figure("converted", seconds=time.perf_counter() - started)
    settings = {
        "PYTHONPATH": str(ROOT),
        "INFERNEO_MODELS": str(checkpoint),
        "INFERNEO_CHECKPOINTS": str(folder),
        "INFERNEO_COMPILATION_CACHE": os.environ.get("CACHE") or str(folder / "compiled"),
        "INFERNEO_KEYS_DB": str(folder / "keys.db"),
        "INFERNEO_SPECULATION": "off",
        "INFERNEO_DTYPE": "bfloat16",
        "INFERNEO_QUANTIZATION": "none",
        "INFERNEO_SLOTS": "4" if dry else "256",
        "INFERNEO_MAX_LEN": "512" if dry else "2048",
    }
    clients, prompt, output = ("2,4", "16", "8") if dry else ("16,64,256", "512", "128")
    load = ("--concurrency", clients, "--prompt-tokens", prompt, "--output-tokens", output)
    if dry:
        load += ("--requests", "4")
    started = time.perf_counter()
    engine = report.run(
        "bench engine", _bench, report, "engine", *load, "--prefill", "none", settings=settings
    )
    report.figure("bench engine", seconds=time.perf_counter() - started)
    for level in engine or ():
        report.figure(f"engine, {level['clients']} clients", **_told(level))
    for own_process in ("false", "true"):
        name = "server, engine in its own process" if own_process == "true" else "server"
        more = settings | {"INFERNEO_ENGINE_PROCESS": own_process}
        report.run(name, _serve_with, report, name, load, more, engine or [])


def _serve_with(
    report: Report, name: str, load: tuple[str, ...], settings: dict[str, str], engine: list[Any]
) -> None:
    """Put the same load on a server."""
    started = time.perf_counter()
    log = report.folder / f"{name.replace(', ', '-').replace(' ', '-')}.log"
    child = Child(OURS, os.environ | settings, log_file=log)
    try:
        if failure := child.wait("/ready", report.left() + 60):
            raise RuntimeError(f"{failure}: {log.read_text()[-1000:]}")
        report.figure(f"{name} ready", seconds=time.perf_counter() - started)
        before, began = _cpu_seconds(child.process.pid), time.perf_counter()
        levels = _bench(report, "serve", "--url", child.url, *load, settings=settings)
        used = _cpu_seconds(child.process.pid) - before
        report.figure(f"{name}: cores", used=used / (time.perf_counter() - began))
    finally:
        child.end()
    alone = {level["clients"]: level["output_tokens_per_second"] for level in engine}
    for level in levels:
        told = _told(level)
        share = told["tok_s"] / alone.get(level["clients"], float("nan"))
        good = report.judged(share >= 0.9)
        report.figure(f"{name}, {level['clients']} clients", good, over_engine=share, **told)
