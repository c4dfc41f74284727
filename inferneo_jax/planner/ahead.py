"""Compiles a model's programs ahead, into a folder from which a start loads them.

The folder is a cache of compiled programs (``runner/compile_cache.py``) with a manifest. Its
programs are those that the runner would compile on the devices, which need not be present.
"""

import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from inferneo_jax.config import DecoderConfig, EncoderConfig, EngineConfig, ModelConfig
from inferneo_jax.engine.embedder import Embedder
from inferneo_jax.errors import ConfigError
from inferneo_jax.layers.blocks import BlockPart
from inferneo_jax.planner.chips import Topology
from inferneo_jax.platform.atomic import partial_of, scratch_folder
from inferneo_jax.platform.progress import Progress
from inferneo_jax.runner.backends import DecoderBackend, resolve_decoder, resolve_encoder
from inferneo_jax.runner.capacity import cache_budget, make_programs, measured_cache_budget
from inferneo_jax.runner.compile_cache import ExecutableStore
from inferneo_jax.runner.manifest import Manifest, decoder_facts
from inferneo_jax.runner.programs import depends, keeps
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.weights.placement import flat, local_bytes, weight_shapes

_CACHE_PART = 0.97
"""Part of the KV cache that the memory permits; devices of one kind may differ by the rest."""
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644
"""Another user may serve from the folder, and nobody else may write to it."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What programs depend on of a model.

    Attributes:
        config: its sizes.
        formats: of the weights that its checkpoint has in blocks, by name; only CPUs use them.
    """

    config: ModelConfig
    formats: Mapping[str, tuple[BlockPart, ...]] = field(default_factory=dict)


def compile_ahead(
    destination: Path,
    engine: EngineConfig,
    model: ModelShape,
    draft: ModelShape | None = None,
    *,
    name: str,
    topology: Topology | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Compile all programs of a model into a new folder, which appears whole or not at all.

    Args:
        destination: the folder.
        engine: the settings that the model will be served with.
        model: the model.
        draft: the model that drafts; None: there is none.
        name: of the model, for the manifest.
        topology: the chips of one host; None: the devices of this machine.
        progress: called with the number of programs that are compiled.

    Raises:
        ConfigError: the folder exists, the model does not fit the devices, or nothing can be
            compiled for them ahead.
    """
    if os.path.lexists(destination):
        raise ConfigError(f"{destination} exists already; name a folder that does not")
    devices = _chips(topology) if topology else jax.local_devices()
    mesh = make_mesh(engine.mesh, devices)
    if isinstance(model.config, EncoderConfig):
        made = _encoder(model.config, engine, mesh)
    else:
        memory = topology.chip.memory_bytes if topology else None
        made = _decoder(model, draft, engine, mesh, memory)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(partial_of(destination)) as folder:
        store = ExecutableStore(folder, mesh, made.facts | made.sizes, made.depends, made.keeps)
        manifest = Manifest(
            model=name,
            made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            facts=made.facts,
            libtpu=_version("libtpu"),
            cache_bytes=made.cache_bytes,
            programs=store.make_all(made.programs, progress),
        )
        manifest.write(folder)
        folder.chmod(_FOLDER_MODE)
        for file in folder.iterdir():
            file.chmod(_FILE_MODE)
        folder.rename(destination)
    return manifest


class _Programs(NamedTuple):
    """All programs of a model, to be lowered, and what they depend on."""

    programs: Mapping[Any, Callable[[], jax.stages.Lowered]]
    facts: dict[str, str]
    sizes: dict[str, str]
    cache_bytes: int
    depends: Callable[[Any, str], bool] = lambda *_: True
    keeps: Callable[[Any], bool] = lambda _: True


def _encoder(model: EncoderConfig, engine: EngineConfig, mesh: Mesh) -> _Programs:
    backend = resolve_encoder(model, engine, mesh)
    weights = flat(weight_shapes(backend.padded, mesh, backend.quantization))
    embedder = Embedder(backend, weights, engine)
    return _Programs(embedder.programs(), embedder.facts, {}, 0)


def _decoder(
    model: ModelShape,
    draft: ModelShape | None,
    engine: EngineConfig,
    mesh: Mesh,
    memory_bytes: int | None,
) -> _Programs:
    """The programs of a decoder, on chips with this much memory each; None: what there is here."""
    backend = _resolve(model, engine, mesh)
    drafter = _resolve(draft, engine, mesh) if draft else None
    weight_bytes = sum(
        local_bytes(flat(weight_shapes(each.padded, mesh, each.quantization)))
        for each in (backend, drafter)
        if each
    )
    if memory_bytes is None:
        budget = measured_cache_budget(mesh, weight_bytes)
    else:
        platform = mesh.devices.flat[0].platform
        budget = cache_budget(platform, total=memory_bytes, free=memory_bytes - weight_bytes)
    if budget <= 0:
        raise ConfigError(
            f"the weights take {weight_bytes / 1e9:.1f} GB a device, which leaves no memory for "
            "the KV cache; `inferneo plan` says what would fit"
        )
    cache_bytes = int(_CACHE_PART * budget)
    programs = make_programs(backend, engine, lambda: cache_bytes, drafter)
    return _Programs(
        {key: partial(programs.lower, key) for key in programs.all_keys()},
        decoder_facts(backend, engine, drafter),
        programs.sizes,
        cache_bytes,
        depends,
        partial(keeps, mesh),
    )


def _resolve(model: ModelShape, engine: EngineConfig, mesh: Mesh) -> DecoderBackend:
    assert isinstance(model.config, DecoderConfig)
    return resolve_decoder(model.config, engine, mesh, model.formats)


def _chips(topology: Topology) -> list[Any]:
    """Descriptions of TPUs of one host.

    Raises:
        ConfigError: they are of several hosts, or none.
    """
    if topology.chip.name in ("cpu", "h100"):
        raise ConfigError(
            f"topology is {topology}; programs are compiled ahead for TPUs. Code for a CPU is that "
            "of one CPU, and XLA chooses a GPU's kernels by timing them: run this on a machine of "
            "that kind, without a topology"
        )
    devices = topology.devices()
    if hosts := max(device.process_index for device in devices):
        raise ConfigError(
            f"topology {topology} has {hosts + 1} hosts; programs are compiled ahead for the "
            f"chips of one, at most {topology.chip.host_chips}"
        )
    return devices


def _version(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
