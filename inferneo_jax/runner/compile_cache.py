"""Keeps compiled programs on disk between starts.

JAX's own persistent cache identifies a program by its lowered form, so each start would have to
trace and lower every program to find it. This cache identifies a program by its inputs: the source
of this package that runs on devices, the versions of JAX and of the device's compiler, the machine,
the mesh, and the configuration. A program whose inputs are unchanged is loaded as it is.

All of these are known without the devices, so a folder can be filled ahead for devices that are
elsewhere (``planner/ahead.py``). Such a folder has a ``Manifest``.
"""

import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.monitoring
import orjson
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from inferneo_jax.errors import ConfigError
from inferneo_jax.files import one_line
from inferneo_jax.platform import compiles
from inferneo_jax.platform.atomic import PARTIAL, write_whole
from inferneo_jax.platform.progress import Progress
from inferneo_jax.platform.trusted import distrust
from inferneo_jax.runner.manifest import digest, manifests

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_from_jax = threading.local()
"""Whether JAX's own cache, if enabled, contained the latest program of this thread."""

_SUFFIX, _TIMES_SUFFIX = ".executable", ".times"
_OURS = (_SUFFIX, _TIMES_SUFFIX, PARTIAL)
_VALID_SECONDS = 7 * 86_400.0
"""Figures that are older are measured again."""
_UNUSED_SECONDS = 30 * 86_400.0
"""A file that no start has used for this long is removed."""
_FOLDER_MODE = 0o755


class ExecutableStore:
    """The executables of one model on one mesh.

    Anyone who can write to the folder can run code in this process, as with JAX's own cache. So
    what others than the user and root could have written is compiled anew, not loaded.

    Args:
        folder: created if it does not exist; None: nothing is kept.
        mesh: the devices that the programs run on.
        facts: everything that the programs depend on, as ``manifest.facts_of`` gives it.
        depends: whether a program, given by its key, depends on a fact, given by its name. What is
            measured depends on all of them.
        keeps: whether a program, given by its key, may be kept.
    """

    def __init__(
        self,
        folder: str | Path | None,
        mesh: Mesh,
        facts: Mapping[str, str],
        depends: Callable[[Any, str], bool] = lambda *_: True,
        keeps: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self._folder = Path(folder) if folder else None
        self._devices = [*mesh.devices.flat]
        self._facts = dict(facts)
        self._depends, self._keeps = depends, keeps
        self._ahead = {name for each in manifests(folder) for name in each.programs}
        self._trusted = True
        if self._folder and self._folder.is_dir() and (why := distrust(self._folder.stat())):
            self._trusted = False
            log.warning("no program is loaded from %s, %s", self._folder, why)

    def compile_all(
        self, programs: Mapping[K, Callable[[], jax.stages.Lowered]], progress: Progress | None
    ) -> dict[K, jax.stages.Compiled]:
        """Load every program from disk, or else lower and compile it, several at a time."""

        def build(key: K) -> jax.stages.Compiled:
            return self._load(key) or self._compile(key, programs[key])

        made = _for_each(programs, build, progress)
        self._remove_unused()
        return made

    def make_all(
        self, programs: Mapping[K, Callable[[], jax.stages.Lowered]], progress: Progress | None
    ) -> dict[str, str]:
        """Compile and keep every program that may be, and load none, for devices anywhere.

        Returns:
            Each program by the name of its file.

        Raises:
            ConfigError: one of them cannot be kept.
        """

        def build(key: K) -> str:
            compiled = programs[key]().compile()
            try:
                return self._keep(key, compiled).name
            except Exception as error:
                raise ConfigError(f"{key} cannot be kept: {one_line(error)}") from error

        kept = {key: lower for key, lower in programs.items() if self._keeps(key)}
        return {file: repr(key) for key, file in _for_each(kept, build, progress).items()}

    def measured(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Figures of these programs, in JSON's types, as an earlier start has measured them.

        After a week they are measured again, so that what disturbed them once is not kept.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = orjson.loads(self._named(name, self._facts, _TIMES_SUFFIX).read_bytes())
            if 0 <= time.time() - kept["measured"] < _VALID_SECONDS:
                return dict(kept["figures"])
        figures = measure()
        content = orjson.dumps({"measured": time.time(), "figures": figures})
        with contextlib.suppress(OSError):  # then they are measured at each start
            write_whole(self._named(name, self._facts, _TIMES_SUFFIX), [content])
        return figures

    def _compile(self, key: Hashable, lower: Callable[[], jax.stages.Lowered]) -> Any:
        _from_jax.hit = False
        compiled = lower().compile()
        # If XLA:CPU has read a program from a file, it serializes it without its functions.
        if self._folder and not _from_jax.hit and self._keeps(key):
            try:
                self._keep(key, compiled)
            except Exception as error:  # noqa: BLE001  (not all platforms can; it is recompiled)
                log.info("a compiled program is not kept: %s", error)
        return compiled

    def _keep(self, key: Hashable, compiled: jax.stages.Compiled) -> Path:
        file = self._file(key)
        # Whatever the umask is, nobody else can write to it.
        file.parent.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
        write_whole(file, [pickle.dumps(serialize_executable.serialize(compiled))])
        return file

    def _load(self, key: Hashable) -> Any:
        """Load the executable from disk; None if there is none, or if it cannot be used."""
        if not self._trusted or not self._keeps(key):
            return None
        try:
            file = self._file(key)
            with file.open("rb") as opened:
                if why := distrust(os.fstat(opened.fileno())):
                    log.warning("%s is not loaded, %s", file, why)
                    return None
                content = opened.read()
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

    def _file(self, key: Hashable) -> Path:
        facts = {name: fact for name, fact in self._facts.items() if self._depends(key, name)}
        return self._named(key, facts, _SUFFIX)

    def _named(self, key: Hashable, facts: Mapping[str, str], suffix: str) -> Path:
        if self._folder is None:
            raise FileNotFoundError
        return self._folder / f"{digest(facts, repr(key))}{suffix}"

    def _remove_unused(self) -> None:
        if not self._folder or not self._folder.is_dir():
            return
        for file in self._folder.glob("*"):
            if file.suffix not in _OURS or file.name in self._ahead:
                continue
            try:
                if time.time() - file.stat().st_mtime > _UNUSED_SECONDS:
                    file.unlink()
            except OSError:  # another process removed it
                continue


def _for_each(
    programs: Mapping[K, object], build: Callable[[K], T], progress: Progress | None
) -> dict[K, T]:
    """What ``build`` makes of every key, several at a time."""

    def announced(key: K) -> T:
        with compiles.expected():
            return build(key)

    made = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for key, program in zip(programs, pool.map(announced, programs), strict=True):
            made[key] = program
            if progress:
                progress("compile", len(made), len(programs))
    return made


def _note_hit(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _from_jax.hit = True


jax.monitoring.register_event_listener(_note_hit)
