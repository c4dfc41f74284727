"""What this machine offers, for ``inferneo doctor``: ``python -m inferneo_jax.survey``.

A program of its own, because a driver that is broken may never return. It prints a JSON object a
line, so that what is known by then is known: first the kernels, then the devices.
"""

import json

import jax

from inferneo_jax.kernels.cpu import build
from inferneo_jax.platform.memory import free_memory, total_memory


def kernels() -> dict[str, object]:
    """The C++ compiler, and whether the native kernels are compiled, or why they cannot be."""
    compiler, compiled, why = build.look()
    return {"compiler": compiler, "compiled": compiled, "why": why, "help": build.HELP}


def devices() -> dict[str, object]:
    """What JAX computes on, and its memory in bytes."""
    found = jax.devices()
    return {
        "platform": found[0].platform,
        "kinds": [device.device_kind for device in found],
        "free_memory": free_memory(),
        "machine_memory": total_memory(),
    }


def main() -> None:
    """Print both."""
    for look in (kernels, devices):
        print(json.dumps({look.__name__: look()}), flush=True)


if __name__ == "__main__":
    main()
