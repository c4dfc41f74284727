"""What a device can do: which CPU this is, and which numbers a device multiplies."""

import platform
from functools import cache
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_LINES = ("model name", "flags", "Features", "CPU part")
"""Prefixes of the lines, on x86 and on Arm, that determine which code may run."""

_TPUS_WITHOUT_INT8 = ("TPU v2", "TPU v3")
_INT8_SINCE = (7, 5)
"""GPUs of this compute capability, Turing's, and later ones multiply int8."""


@cache
def cpu_description() -> str:
    """One fact per line, the same at every start; without /proc/cpuinfo, what Python reports."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(_CPUINFO_LINES)}))


def multiplies_bfloat16(device: Any) -> bool:
    """Whether the device has instructions for products of bfloat16."""
    if device.platform != "cpu":
        return True
    return any(name in cpu_description() for name in ("avx512_bf16", "amx_bf16"))


def multiplies_int8(device: Any) -> bool:
    """Whether the device has instructions for products of int8."""
    if device.platform == "tpu":
        return device.device_kind not in _TPUS_WITHOUT_INT8
    if device.platform in ("gpu", "cuda"):
        return compute_capability(device) >= _INT8_SINCE
    return True


def compute_capability(device: Any) -> tuple[int, ...]:
    """A GPU's compute capability, such as ``(8, 0)``; empty where it is unknown."""
    capability = str(getattr(device, "compute_capability", ""))
    return tuple(int(n) for n in capability.split(".") if n.isdecimal())
