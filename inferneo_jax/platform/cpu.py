"""What this machine's CPU says of itself: which it is, and which instructions it has."""

import platform
from functools import cache
from pathlib import Path

_FILE = Path("/proc/cpuinfo")
_TELLING = ("model name", "flags", "Features", "CPU part")
"""How the lines begin, on x86 and on Arm, that say what code may run."""


@cache
def description() -> str:
    """A fact a line, the same at every start; without Linux' file, what Python knows of it."""
    try:
        lines = _FILE.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(_TELLING)}))


def multiplies_bfloat16() -> bool:
    """Whether it has instructions for products of bfloat16."""
    return any(name in description() for name in ("avx512_bf16", "amx_bf16"))
