"""The host's time per step, with a device that answers at once.

It is the CPU time of the engine without HTTP: scheduling, arguments, dispatch through Python (the
programs return ready arrays, so the time of XLA's own dispatch is not in it), reading and delivery.

    python -m tests.accelerators.bench_host --rows 16 64 256
"""

import argparse
import time

from inferneo_jax.config import DecoderConfig
from inferneo_jax.engine.engine import Engine
from tests.support.instant_device import instant_runner
from tests.support.tiny_model import TINY, submit

LENGTH = 1024
"""Positions of a sequence."""


def measure(rows: int, tokens: int, decode_steps: int) -> float:
    """Microseconds of CPU time of a step with so many rows."""
    model = TINY.to_dict() | {"context_length": LENGTH}
    runner = instant_runner(
        model=DecoderConfig.from_dict(model),
        kv_tokens=rows * LENGTH,
        slots=rows,
        decode_steps=decode_steps,
    )
    engine = Engine(runner)
    try:
        for _ in range(2):  # the first time, Python's caches are filled
            before, started = engine.stats(), time.process_time()
            requests = [submit(engine, (1, 2, 3), tokens) for _ in range(rows)]
            for each in requests:
                each.wait()
            seconds, after = time.process_time() - started, engine.stats()
        return 1e6 * seconds / (after.steps - before.steps)
    finally:
        engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--decode-steps", type=int, nargs="*", default=[1, 8])
    options = parser.parse_args()
    print(f"{'rows':>6}{'steps at once':>15}{'us a step':>12}{'us a token':>12}")
    for rows in options.rows:
        for decode_steps in options.decode_steps:
            micro = measure(rows, options.tokens, decode_steps)
            print(f"{rows:6}{decode_steps:15}{micro:12.0f}{micro / rows:12.2f}")


if __name__ == "__main__":
    main()
