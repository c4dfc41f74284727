"""What compiled programs depend on, by name, and what is said of those that were compiled ahead.

The facts are known without the devices. They identify a program in the cache
(``compile_cache.py``), and say what differs where programs from elsewhere do not fit.
"""

import dataclasses
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import jaxlib.version
import orjson
from jax.sharding import Mesh

from inferneo_jax.config import EngineConfig
from inferneo_jax.files import one_line
from inferneo_jax.platform.atomic import write_whole
from inferneo_jax.platform.devices import cpu_description
from inferneo_jax.platform.source import DEVICE_ROOMS, source_hash
from inferneo_jax.platform.trusted import distrust
from inferneo_jax.runner.backends import DecoderBackend, EncoderBackend

log = logging.getLogger(__name__)

_SUFFIX = ".manifest"
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")
"""Environment variables that affect compilation."""
_DEVICE_COUNT = "--xla_force_host_platform_device_count"
"""The mesh says it, of the devices that programs run on."""
_MAX_BYTES = 4 * 2**20
_SHOWN_DIFFERENCES, _SHOWN_LENGTH = 4, 100


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The programs of one model that were compiled ahead into a folder.

    Attributes:
        model: the name that it was compiled under.
        made: when, in ISO 8601.
        facts: everything that the programs depend on, as ``facts_of`` gives it.
        libtpu: the version of that package, where it was installed; else empty.
        cache_bytes: what one device has for the KV cache; 0 for a model without one. A start
            gives it as much, so that it has the same programs.
        programs: each program by the name of its file.
    """

    model: str
    made: str
    facts: dict[str, str]
    libtpu: str
    cache_bytes: int
    programs: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write it beside its programs."""
        file = folder / f"{digest(self.facts)}{_SUFFIX}"
        write_whole(file, [orjson.dumps(dataclasses.asdict(self), option=orjson.OPT_INDENT_2)])

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a manifest; raises OSError, or ValueError or TypeError if it is none."""
        with file.open("rb") as opened:
            return cls(**orjson.loads(opened.read(_MAX_BYTES)))

    def differences(self, facts: Mapping[str, str]) -> list[str]:
        """What differs between its facts and others, each in a phrase."""
        return [
            f"{name} is {_shown(facts.get(name))} and was {_shown(self.facts.get(name))}"
            for name in sorted(self.facts.keys() | facts.keys())
            if self.facts.get(name) != facts.get(name)
        ]


def manifests(folder: str | Path | None) -> list[Manifest]:
    """The manifests in a folder, if others cannot have written it.

    Those that cannot be read are left out, with a warning.
    """
    if folder is None or not Path(folder).is_dir() or distrust(Path(folder).stat()):
        return []
    found = []
    for file in sorted(Path(folder).glob(f"*{_SUFFIX}")):
        try:
            found.append(Manifest.read(file))
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s cannot be read: %s", file, one_line(error))
    return found


def compiled_ahead(folder: str | Path | None, facts: Mapping[str, str]) -> Manifest | None:
    """The manifest of programs that have these facts; None: there is none.

    If there are others for a model of this kind, a warning says what differs in the nearest.
    """
    known = [each for each in manifests(folder) if each.facts.get("model") == facts["model"]]
    nearest = min(known, key=lambda each: len(each.differences(facts)), default=None)
    if nearest is None:
        return None
    if differences := nearest.differences(facts):
        shown = differences[:_SHOWN_DIFFERENCES]
        if more := len(differences) - len(shown):
            shown.append(f"{more} more")
        log.warning(
            "the programs in %s, compiled ahead for %s, do not fit and are compiled anew: %s",
            folder,
            nearest.model,
            "; ".join(shown),
        )
        return None
    return nearest


def decoder_facts(
    backend: DecoderBackend, config: EngineConfig, draft: DecoderBackend | None
) -> dict[str, str]:
    """What the programs of a decoder depend on, but for the sizes that follow from the memory."""
    batch = config.batch_sizes(backend.platform)
    return facts_of(backend.mesh, model=backend, draft_model=draft, settings=config, batch=batch)


def encoder_facts(backend: EncoderBackend, sizes: tuple[int, ...]) -> dict[str, str]:
    """What the programs of an encoder depend on; ``sizes`` are those of its batches, in tokens."""
    return facts_of(backend.mesh, model=backend, sizes=sizes)


def facts_of(mesh: Mesh, **parts: object) -> dict[str, str]:
    """Everything that programs on a mesh depend on, by name; the same text in every process.

    The devices need not be present: a topology of them has the same facts.

    Args:
        mesh: the devices that the programs run on.
        parts: what they are programs of. Dataclasses are taken apart, field by field.
    """
    devices = [*mesh.devices.flat]
    device = devices[0]
    hosts = {each.process_index for each in devices}
    facts = {
        "source": source_hash(*DEVICE_ROOMS),
        "python": "{}.{}".format(*sys.version_info),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "compiler": device.client.platform_version,
        "device": f"{device.platform}, {device.device_kind}",
        # Code that was compiled for another CPU may not run on this one.
        "machine": cpu_description() if device.platform == "cpu" else platform.machine(),
        "mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "devices": " ".join(map(_place, devices)),
        "process": f"{jax.process_index()} of {len(hosts)}",
    }
    facts |= {name: _variable(name) for name in _ENVIRONMENT}
    for name, part in parts.items():
        facts |= _flat(name, part)
    return facts


def _place(device: Any) -> str:
    """The number of a device, and where it is in its network if it is in one."""
    coords = getattr(device, "coords", None)
    return f"{device.id}({','.join(map(str, coords))})" if coords else str(device.id)


def _variable(name: str) -> str:
    """The value of a variable of the environment, without the number of CPU devices."""
    words = os.environ.get(name, "").split()
    return " ".join(word for word in words if not word.startswith(_DEVICE_COUNT))


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass, and those of the dataclasses in it, by dotted names."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if not isinstance(value, Mesh):  # which has facts of its own
            yield name, repr(value)
        return
    yield name, type(value).__name__
    for field in dataclasses.fields(value):
        if field.repr:
            yield from _flat(f"{name}.{field.name}", getattr(value, field.name))


def digest(*made_of: object) -> str:
    """A name for JSON values, the same in every process."""
    return hashlib.sha256(orjson.dumps(made_of, option=orjson.OPT_SORT_KEYS)).hexdigest()[:40]


def _shown(fact: str | None) -> str:
    text = "not set" if not fact else one_line(fact)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."
