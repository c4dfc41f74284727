"""How much memory there is, and what to say when it is not enough."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inferneo_jax.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)
_MEMINFO = Path("/proc/meminfo")
_ADVICE = "Lower slots or max_len, or serve a smaller model"


def total_memory() -> int:
    """Bytes that this process may have at all: the machine's, or its control group's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _group())])


def free_memory() -> int:
    """Bytes that can still be had: of the fullest accelerator here, else of this machine."""
    import jax

    accelerators = [device for device in jax.local_devices() if device.platform != "cpu"]
    known = [stats for device in accelerators if (stats := device.memory_stats())]
    if known:
        return min(int(stats["bytes_limit"]) - int(stats["bytes_in_use"]) for stats in known)
    return free_host_memory()


def free_host_memory() -> int:
    """Bytes of this machine's memory, or its control group's, that can still be had."""
    return min([_available(), *(limit - used for limit, used in _group())])


def require(needed: int, what: str) -> None:
    """Refuse to begin what would not fit.

    Raises:
        ConfigError: ``needed`` bytes are more than are free.
    """
    if needed > (free := free_memory()):
        raise ConfigError(
            f"{what} would take {_gigabytes(needed)} and {_gigabytes(free)} of memory are free. "
            f"{_ADVICE}"
        )


@contextmanager
def oom_as_config_error(what: str) -> Iterator[None]:
    """Turn running out of memory, on the host or a device, into a configuration error.

    Raises:
        ConfigError: memory ran out while ``what``.
    """
    import jax

    try:
        yield
    except MemoryError as error:
        raise _exhausted(what) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise _exhausted(what) from error


def _exhausted(what: str) -> ConfigError:
    return ConfigError(f"memory ran out while {what}. {_ADVICE}")


def _available() -> int:
    """What the kernel reckons new programs can have; unknown elsewhere, so everything."""
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return total_memory()


def _group() -> Iterator[tuple[int, int]]:
    """Limit and use of the control group, in bytes, where there is one."""
    for limit_name, used_name in _LIMITS:
        limit, used = _CGROUP / limit_name, _CGROUP / used_name
        if limit.exists() and used.exists():
            text = limit.read_text(encoding="ascii").strip()
            if text.isdigit():
                yield int(text), int(used.read_text(encoding="ascii"))


def _gigabytes(number: int) -> str:
    return f"{max(0, number) / 1e9:.1f} GB"


def malloc_trim() -> None:
    """Give the operating system what the C library's allocator keeps of freed memory (glibc).

    Loading and compiling leave hundreds of MB of it, spread over an arena for each thread.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
