"""What a device can do: which CPU this is, and which numbers a device multiplies."""

import platform
from functools import cache
from pathlib import Path
from typing import Any, Literal

_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_LINES = ("model name", "flags", "Features", "CPU part")
"""Prefixes of the lines, on x86 and on Arm, that determine which code may run."""

_TPUS_WITHOUT_INT8 = ("TPU v2", "TPU v3")
_TPUS_WITHOUT_FP8 = ("TPU v2", "TPU v3", "TPU v4", "TPU v5", "TPU v6")
_INT8_SINCE, _FP8_SINCE = (7, 5), (8, 9)
"""GPUs of these compute capabilities, Turing's and Ada's, and later ones multiply them."""


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


def multiplies(device: Any, numbers: Literal["int8", "fp8"]) -> bool:
    """Whether the device has instructions for products of these numbers of 8 bits."""
    if device.platform == "tpu":
        kinds = _TPUS_WITHOUT_INT8 if numbers == "int8" else _TPUS_WITHOUT_FP8
        return not device.device_kind.startswith(kinds)
    if device.platform in ("gpu", "cuda"):
        since = _INT8_SINCE if numbers == "int8" else _FP8_SINCE
        return compute_capability(device) >= since
    return numbers == "int8"


def compute_capability(device: Any) -> tuple[int, ...]:
    """A GPU's compute capability, such as ``(8, 0)``; empty where it is unknown."""
    capability = str(getattr(device, "compute_capability", ""))
    return tuple(int(n) for n in capability.split(".") if n.isdecimal())
