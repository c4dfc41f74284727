"""Compile the GPU attention kernels for an H100 on a machine without any GPU.

XLA compiles for the GPU that a description names, so this proves that write and attend compile for
every head size and dtype, that the cache is updated in place and how many registers a kernel takes.
Nothing is run. In an environment of its own, with the repository's root as working directory:

    python3 -m venv /tmp/h100
    /tmp/h100/bin/pip install -e '.[plan-cuda]'
    /tmp/h100/bin/python tests/accelerators/compile_h100.py

jax-cuda12-pjrt comes with the plugin. Arguments choose among dtypes: ``bfloat16 int8 float32``.
The exit status is the number of cases that failed.
"""

# ruff: noqa: E402 - the environment is set before jax reads it

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DUMP = tempfile.TemporaryDirectory()
# The plugin looks for a GPU's driver unless CPU is the platform; its compiler needs none.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP.name} --xla_dump_hlo_as_text"
os.environ["MOSAIC_GPU_DUMP_TO"] = DUMP.name

import jax
import jax.numpy as jnp
import nvidia.cuda_nvcc
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inferneo_jax.kernels.gpu.attention import HopperPagedAttention
from inferneo_jax.layers.cache import AttentionMetadata, LayerCache
from inferneo_jax.planner.chips import H100_TARGET

PAGES, PAGE_LEN, MAX_PAGES = 4097, 16, 256
STEPS = {"decode": (32, 1), "prefill": (1, 256), "prefill x 4": (4, 256)}
SPLITS = ((1, 8, 4), (1, 3, 3), (2, 2, 9))
"""GPUs, KV heads over all of them, query heads to a KV head."""


def compile_step(
    mesh: Mesh,
    head_dim: int,
    dtype: jnp.dtype,
    rows: int,
    tokens: int,
    *,
    kv_heads: int,
    group: int,
) -> jax.stages.Compiled:
    """Write and attend, split over the mesh by KV head."""
    local_heads = kv_heads // mesh.size
    attention = HopperPagedAttention(local_heads, head_dim, PAGE_LEN, dtype)
    by_head, whole = PartitionSpec(None, "model"), PartitionSpec()
    by_token = PartitionSpec(None, None, "model")

    def array(spec: PartitionSpec, dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    pages = array(by_head, dtype, PAGES, kv_heads, PAGE_LEN, head_dim)
    scales = (
        array(by_head, jnp.float32, PAGES, kv_heads, 1, PAGE_LEN) if dtype == jnp.int8 else None
    )
    cache = LayerCache(pages, pages, scales, scales)
    new = array(by_token, jnp.float32, rows, tokens, kv_heads, head_dim)
    queries = array(by_token, jnp.float32, rows, tokens, kv_heads, group, head_dim)
    block_tables = array(whole, jnp.int32, rows, MAX_PAGES)
    metadata = AttentionMetadata(block_tables, array(whole, jnp.int32, rows, tokens))

    def step(cache, queries, keys, values, metadata):
        cache = attention.write(cache, keys, values, metadata)
        return attention.attend(queries, cache, metadata), cache

    specs = (by_head, by_token, by_token, by_token, whole)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(by_token, by_head))
    return jax.jit(sharded, donate_argnums=0).lower(cache, queries, new, new, metadata).compile()


def kernel_facts() -> tuple[int, int, int]:
    """Of the kernel compiled last: its registers, spilled bytes and bytes of shared memory."""
    dump = Path(DUMP.name)
    for report in dump.glob("*.ptxas"):  # of the kernel by Mosaic, if it is one
        passes = next(dump.glob("*.mlir-passes.log")).read_text()
        shared = _number(r"dynamic_shared_memory_size %c(\d+)", passes)
        return (*_registers(report.read_text()), shared)
    ptxas = Path(next(iter(nvidia.cuda_nvcc.__path__))) / "bin" / "ptxas"
    source = next(file for file in dump.glob("*.ptx") if "paged_attention" in file.read_text())
    command = [ptxas, "-v", "-arch=sm_90a", source, "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    thunks = next(dump.glob("*thunk_sequence.txt")).read_text()
    shared = _number(r"paged_attention .*shared_memory: (\d+)", thunks)
    return (*_registers(log[log.index("'paged_attention'") :]), shared)


def _registers(log: str) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas reports them."""
    return _number(r"Used (\d+) registers", log), _number(r"(\d+) bytes spill stores", log)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text}"
    return int(found[1])


def main() -> int:
    """Compile every case and print a line for each."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100_TARGET, topology="1x1x2"
    )
    heads = "{:9}{:>9} {:11} {:>9}{:>5}{:>12}{:>12}{:>10}{:>6}{:>6}{:>8}"
    print(heads.format("dtype", "head_dim", "step", "kv x group", "gpus", "argument", "alias",
                       "temporary", "regs", "spill", "shared"))  # fmt: skip
    dtypes = [jnp.dtype(name) for name in sys.argv[1:] or ["bfloat16"]]
    cases = itertools.product(dtypes, (64, 80, 96, 128, 256), STEPS.items(), SPLITS)
    failures = 0
    for dtype, head_dim, (name, (rows, tokens)), (gpus, kv_heads, group) in cases:
        for file in Path(DUMP.name).iterdir():
            file.unlink()
        mesh = Mesh(topology.devices[:gpus], ("model",))
        case = (dtype.name, head_dim, name, f"{kv_heads} x {group}", gpus)
        try:
            compiled = compile_step(
                mesh, head_dim, dtype, rows, tokens, kv_heads=kv_heads, group=group
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we print
            failures += 1
            print(*case, "FAILED:", error, flush=True)
            continue
        memory = compiled.memory_analysis()
        sizes = (
            memory.argument_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
        )
        print(heads.format(*case, *sizes, *kernel_facts()), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
