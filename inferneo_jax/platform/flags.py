"""Settings of XLA and its runtimes that this program makes for an accelerator, with their reasons.

They are environment variables, which are read when JAX first looks for devices. What the
environment sets already stays as it is. For TPUs and CPUs nothing is set.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_XLA_FLAGS = "XLA_FLAGS"
_DEVICE_FILES = {
    "gpu": ("dev/nvidiactl", "dev/nvidia0", "dev/dxg"),
    "tpu": ("dev/accel[0-9]*", "dev/vfio/[0-9]*"),
}
"""By platform, patterns of files that only a machine with such a device has. WSL has ``/dev/dxg``;
TPUs since v5e are in numbered groups of VFIO."""
_PACKAGES = {"gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
"""By platform, packages of which JAX needs one to use it."""
_NAMES = {"gpu": ("gpu", "cuda"), "tpu": ("tpu",)}
"""By platform, its names in ``JAX_PLATFORMS``."""
GPU_MEMORY_PART = 0.92
"""Of a GPU's memory, what JAX takes."""


class Flag(NamedTuple):
    """A setting.

    Attributes:
        variable: of the environment.
        value: of it; in ``XLA_FLAGS``, one flag.
        why: it is set.
    """

    variable: str
    value: str
    why: str


GPU_FLAGS = (
    Flag(
        "XLA_CLIENT_MEM_FRACTION",
        str(GPU_MEMORY_PART),
        "JAX takes this part of a GPU's memory at once, three quarters by default: the rest would "
        "be lost to the KV cache",
    ),
    Flag(
        "PJRT_GPU_ENABLE_ASYNC_DISPATCH",
        "1",
        "one GPU is otherwise driven by the thread that dispatches, which is to go on meanwhile",
    ),
    Flag(
        _XLA_FLAGS,
        "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
        "a step is launched as a CUDA graph, with the loops of sampling in it",
    ),
)
_OLD_NAMES = {"XLA_CLIENT_MEM_FRACTION": "XLA_PYTHON_CLIENT_MEM_FRACTION"}
"""JAX refuses to have both."""


def accelerator(root: Path = Path("/")) -> str | None:
    """``gpu`` or ``tpu``, by what the machine has, whether JAX can use it or not; None: neither."""
    for platform, files in _DEVICE_FILES.items():
        if any(found for file in files for found in root.glob(file)):
            return platform
    return None


def expected_platform(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str:
    """What JAX will compute on here: ``gpu``, ``tpu`` or ``cpu``, without loading JAX to ask it.

    A device whose driver fails is not noticed.
    """
    found = accelerator(root)
    usable = found and _wanted(found, environment) and any(map(find_spec, _PACKAGES[found]))
    return found if found and usable else "cpu"


def _wanted(platform: str, environment: Mapping[str, str]) -> bool:
    """Whether the environment lets JAX use a platform."""
    wanted = environment.get("JAX_PLATFORMS", "")
    return not wanted or any(name in wanted for name in _NAMES[platform])


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """The version of NVIDIA's driver, such as ``580.95.05``; None where it does not say."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def set_flags(
    environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")
) -> list[Flag]:
    """Set what this machine's accelerator needs, before JAX looks for devices.

    Returns:
        What was set, or was set like that before.
    """
    if accelerator(root) != "gpu" or not _wanted("gpu", environment):
        return []
    return [flag for flag in GPU_FLAGS if _set(environment, flag)]


def _set(environment: MutableMapping[str, str], flag: Flag) -> bool:
    """Set a flag unless the environment has another value; whether it has this one now."""
    if flag.variable != _XLA_FLAGS:
        if _OLD_NAMES.get(flag.variable) in environment:
            return False
        return environment.setdefault(flag.variable, flag.value) == flag.value
    given = environment.get(_XLA_FLAGS, "").split()
    name = flag.value.partition("=")[0]
    if any(each.partition("=")[0] == name for each in given):
        return flag.value in given
    environment[_XLA_FLAGS] = " ".join([*given, flag.value])
    return True
