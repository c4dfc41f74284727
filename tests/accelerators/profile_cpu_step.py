"""Where the time of a CPU's steps goes, by JAX's own profiler.

    python -m tests.accelerators.profile_cpu_step
    python -m tests.accelerators.profile_cpu_step --rows 1,16 --live 140

For a decode step of each number of rows, and for a chunk of 256 prompt tokens, the milliseconds of
products, attention, sampling and all else that the device does, and what is left: dispatch and the
time between operations. The model is that of ``bench_cpu_steps``. Leave the machine alone
meanwhile. Tracing slows what it looks at, by a quarter and more: so the whole step is timed without
it too, and the parts are to be read as shares.
"""

import argparse
import gc
import gzip
import json
import re
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from inferneo_jax.runner.programs import Decode, Prefill
from tests.accelerators.bench_cpu_steps import Steps, load, median

_STEPS = 20
_CALL = re.compile(
    r'%(\S+) = .*? custom-call\(.*custom_call_target="\w*?_(linear|feed|attention|take)[_"]'
)
_OPERATION = re.compile(r"%(\S+) = ")
_CONTAINERS = re.compile(r"^(call|while|conditional|cond)\b")


def operations(compiled: Any, sampling: bool) -> dict[str, str]:
    """What each operation of a program is for, by the name that the profiler gives it."""
    text = compiled.as_text()
    kinds = dict.fromkeys(_OPERATION.findall(text), "sampling" if sampling else "other operations")
    names = {
        "linear": "products",
        "feed": "products",
        "attention": "attention",
        "take": "other operations",
    }
    return kinds | {name: names[kind] for name, kind in _CALL.findall(text)}


def profile(run: Any, programs: tuple[Any, Any]) -> dict[str, float]:
    """Milliseconds of a step by what they are for, averaged over some.

    ``step`` is the whole, ``alone`` that without tracing.
    """
    alone = median(run, 1.0)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            started = time.perf_counter()
            for _ in range(_STEPS):
                jax.block_until_ready(run())
            seconds = time.perf_counter() - started
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        content = json.loads(gzip.decompress(file.read_bytes()))
    events = content["traceEvents"] if isinstance(content, dict) else content
    kinds = operations(programs[1], sampling=True) | operations(programs[0], sampling=False)
    found: Counter[str] = Counter()
    for event in events:
        kind = kinds.get(event["name"]) if event.get("ph") == "X" else None
        if kind and not _CONTAINERS.match(event["name"]):
            found[kind] += event["dur"]
    parts = {kind: found[kind] / _STEPS / 1e3 for kind in sorted(set(kinds.values()))}
    return parts | {"step": seconds / _STEPS * 1e3, "alone": alone}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--live", type=int, default=140, help="positions of each row before")
    options = parser.parse_args()
    rows = [int(each) for each in options.rows.split(",")]
    steps = Steps(*load({}, tuple(sorted({max(2, each) for each in rows}))))
    columns: dict[str, dict[str, float]] = {}
    for count in rows:
        key = Decode(max(2, count))
        arguments = steps.arguments(key, positions=np.full(key.rows, options.live, np.int32))
        arguments.slots[count:] = np.iinfo(np.int32).max  # the others are padding
        programs = steps.compiled(key)
        columns[f"{count} rows"] = profile(partial(steps.run, programs, arguments), programs)
    prefill = Prefill(1, 256)
    whole, last = np.full(1, 256, np.int32), np.ones(1, bool)
    arguments = steps.arguments(prefill, start=np.zeros(1, np.int32), length=whole, last=last)
    programs = steps.compiled(prefill)
    columns["256 tokens"] = profile(partial(steps.run, programs, arguments), programs)
    print(f"{'ms':>18}", *(f"{name:>12}" for name in columns))
    kinds = ("products", "attention", "sampling", "other operations")
    for kind in kinds:
        print(f"{kind:>18}", *(f"{each.get(kind, 0):12.2f}" for each in columns.values()))
    left = [each["step"] - sum(each.get(kind, 0) for kind in kinds) for each in columns.values()]
    print(f"{'between them':>18}", *(f"{value:12.2f}" for value in left))
    print(f"{'step':>18}", *(f"{each['step']:12.2f}" for each in columns.values()))
    print(f"{'without tracing':>18}", *(f"{each['alone']:12.2f}" for each in columns.values()))


if __name__ == "__main__":
    main()
