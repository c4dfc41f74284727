"""Keeps compiled programs on disk between starts.

JAX's own persistent cache identifies a program by its lowered form, so each start would have to
trace and lower every program to find it. This cache identifies a program by its inputs: the source
of this package that runs on devices, the versions of JAX and of the device's compiler, the machine,
the mesh, and the configuration. A program whose inputs are unchanged is loaded as it is.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.monitoring
import jaxlib.version
import orjson
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from inferneo_jax.platform import compiles
from inferneo_jax.platform.atomic import PARTIAL, write_whole
from inferneo_jax.platform.devices import cpu_description
from inferneo_jax.platform.progress import Progress
from inferneo_jax.platform.source import DEVICE_ROOMS, source_hash

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

_from_jax = threading.local()
"""Whether JAX's own cache, if enabled, contained the latest program of this thread."""

_SUFFIX, _TIMES_SUFFIX = ".executable", ".times"
_OURS = (_SUFFIX, _TIMES_SUFFIX, PARTIAL)
_VALID_SECONDS = 7 * 86_400.0
"""Figures that are older are measured again."""
_UNUSED_SECONDS = 30 * 86_400.0
"""A file that no start has used for this long is removed."""
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")
"""Environment variables that affect compilation."""


class ExecutableStore:
    """The executables of one model on one mesh.

    Anyone who can write to the folder can run code in this process, as with JAX's own cache.

    Args:
        folder: created if it does not exist; None: nothing is kept.
        mesh: the devices that the programs run on.
        facts: everything else that the programs depend on. Different facts must have different
            ``repr``, which must be the same in every process.
    """

    def __init__(self, folder: str | Path | None, mesh: Mesh, *facts: object) -> None:
        self._folder = Path(folder) if folder else None
        self._devices = [*mesh.devices.flat]
        self._made_of = "\n".join(map(repr, (*_surroundings(mesh), *facts)))

    def compile_all(
        self, programs: Mapping[K, Callable[[], jax.stages.Lowered]], progress: Progress | None
    ) -> dict[K, jax.stages.Compiled]:
        """Load every program from disk, or else lower and compile it, several at a time."""

        def build(key: K) -> jax.stages.Compiled:
            with compiles.expected():
                return self._load(key) or self._compile(key, programs[key])

        made = {}
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for key, program in zip(programs, pool.map(build, programs), strict=True):
                made[key] = program
                if progress:
                    progress("compile", len(made), len(programs))
        self._remove_unused()
        return made

    def measured(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Figures of these programs, in JSON's types, as an earlier start has measured them.

        After a week they are measured again, so that what disturbed them once is not kept.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = orjson.loads(self._file(name, _TIMES_SUFFIX).read_bytes())
            if 0 <= time.time() - kept["measured"] < _VALID_SECONDS:
                return dict(kept["figures"])
        figures = measure()
        content = orjson.dumps({"measured": time.time(), "figures": figures})
        with contextlib.suppress(OSError):  # then they are measured at each start
            write_whole(self._file(name, _TIMES_SUFFIX), [content])
        return figures

    def _compile(self, key: Hashable, lower: Callable[[], jax.stages.Lowered]) -> Any:
        _from_jax.hit = False
        compiled = lower().compile()
        # If XLA:CPU has read a program from a file, it serializes it without its functions.
        if self._folder and not _from_jax.hit:
            try:
                content = pickle.dumps(serialize_executable.serialize(compiled))
                write_whole(self._file(key), [content])
            except Exception as error:  # noqa: BLE001  (not all platforms can; it is recompiled)
                log.info("a compiled program is not kept: %s", error)
        return compiled

    def _load(self, key: Hashable) -> Any:
        """Load the executable from disk; None if there is none, or if it cannot be used."""
        try:
            file = self._file(key)
            content = file.read_bytes()
            with contextlib.suppress(PermissionError):  # the file belongs to another user
                os.utime(file)
            program, inputs, outputs = pickle.loads(content)  # noqa: S301  (as safe as the folder)
            return serialize_executable.deserialize_and_load(
                program,
                inputs,
                outputs,
                backend=self._devices[0].client,
                execution_devices=self._devices,
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001  (a damaged file can raise anything)
            log.warning("a kept program cannot be loaded and is compiled again: %s", error)
            return None

    def _file(self, key: Hashable, suffix: str = _SUFFIX) -> Path:
        if self._folder is None:
            raise FileNotFoundError
        name = hashlib.sha256(f"{self._made_of}\n{key!r}".encode()).hexdigest()
        return self._folder / f"{name[:40]}{suffix}"

    def _remove_unused(self) -> None:
        if not self._folder or not self._folder.is_dir():
            return
        for file in self._folder.glob("*"):
            if file.suffix not in _OURS:
                continue
            try:
                if time.time() - file.stat().st_mtime > _UNUSED_SECONDS:
                    file.unlink()
            except OSError:  # another process removed it
                continue


def _surroundings(mesh: Mesh) -> list[object]:
    """Everything except the model that the programs depend on."""
    device = mesh.devices.flat[0]
    return [
        source_hash(*DEVICE_ROOMS),
        (jax.__version__, jaxlib.version.__version__, sys.version),
        (device.platform, device.device_kind, device.client.platform_version),
        # Code that was compiled for another CPU may not run on this one.
        cpu_description() if device.platform == "cpu" else platform.machine(),
        [os.environ.get(name) for name in _ENVIRONMENT],
        (mesh.axis_names, mesh.devices.shape, [each.id for each in mesh.devices.flat]),
        (jax.process_index(), jax.process_count(), jax.device_count()),
    ]


def _note_hit(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _from_jax.hit = True


jax.monitoring.register_event_listener(_note_hit)
