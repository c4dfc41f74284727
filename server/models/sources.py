"""The sources of the models that the settings name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from inferneo_jax import CheckpointError, ConfigError
from server.config.settings import Settings

if TYPE_CHECKING:
    from inferneo_jax import EngineProcess, Job, Model, Offer

log = structlog.get_logger(__name__)

Progress = Callable[[str, int, int], None]
Loader = Callable[["Source", Settings, Progress], "Model"]


@dataclass(frozen=True)
class Source:
    """A model's source: the file or folder ``path``, or a name that is here or is pulled."""

    id: str
    path: Path | None = None


def load_from_disk(
    source: Source,
    settings: Settings,
    progress: Progress,
    job: "Job | None" = None,
    process: "EngineProcess | None" = None,
) -> "Model":
    """Pull the model if it is missing, then load it. Blocks.

    Args:
        source: of the model.
        settings: of the server.
        progress: called with how far it is.
        job: the other processes that run the model together with this one.
        process: the process that runs it instead of this one.

    Raises:
        InferneoError: it cannot be had, or cannot be used.
    """
    if job:
        job.join(progress)
    path = folder_of(source, settings, progress, process)
    drafter = draft_source(settings)
    draft = folder_of(drafter, settings, progress, process) if drafter else None
    from inferneo_jax import malloc_trim

    malloc_trim()  # of a description: 130 MB for a vocabulary of 150,000
    config = settings.engine_config()
    if process:
        return process.load(path, config, name=source.id, progress=progress, draft=draft)
    # Here, because it brings in jax.
    from inferneo_jax import load_model

    return load_model(
        path,
        config,
        name=source.id,
        progress=progress,
        job=job,
        draft=draft,
        handover=settings.handover_config(),
    )


def folder_of(
    source: Source, settings: Settings, progress: Progress, process: "EngineProcess | None" = None
) -> Path:
    """The model's folder; the model is pulled if it is missing, or described if it is a file.

    Args:
        source: of the model.
        settings: of the server.
        progress: called with how far it is.
        process: pulls or describes it instead of this process.

    Raises:
        InferneoError: it cannot be had.
    """
    from inferneo_jax import checkpoint_path

    checkpoints = settings.checkpoints_dir()
    if not source.path and (path := checkpoint_path(checkpoints, source.id)).exists():
        return path
    if process:
        return process.obtain(source.id, source.path, checkpoints, progress)
    # Here, because they bring in jax.
    from inferneo_jax import describe, pull

    if source.path:
        return describe(source.path, checkpoints, progress)
    return pull(source.id, checkpoints, progress, announce=_log_offer)


def _log_offer(offer: "Offer") -> None:
    what = "; ".join(line.strip() for line in str(offer).splitlines())
    log.info("pulling", model=offer.name, what=what, bytes=offer.size - offer.kept)


def sources_of(settings: Settings) -> list[Source]:
    """The sources that the settings name, in the same order.

    Raises:
        ConfigError: two models would have the same id.
    """
    sources = [
        _source(name, settings.named("models")) for name in settings.models or _default_models()
    ]
    ids = [source.id for source in sources]
    if twice := [i for i in ids if ids.count(i) > 1]:
        raise ConfigError(
            f"{settings.named('models')} names two models that would be called {twice[0]!r}"
        )
    for alias, target in settings.aliases.items():
        if target not in ids:
            raise ConfigError(
                f"{settings.named('aliases')}: {alias!r} stands for {target!r}, which is "
                f"not among the models {', '.join(ids)}"
            )
        if alias in ids:
            raise ConfigError(
                f"{settings.named('aliases')}: {alias!r} is the id of a model already"
            )
    return sources


def draft_source(settings: Settings) -> Source | None:
    """The source of the model that drafts; None if the settings name none.

    Raises:
        ConfigError: there is no file or folder of this name.
    """
    if settings.draft_model is None:
        return None
    return _source(settings.draft_model, settings.named("draft_model"))


def _source(name: str, setting: str) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(path.resolve().name, path.resolve())
    if path.is_file():
        # Not resolved: the Hub's cache links a file of this name to one that is named by its hash.
        return Source(path.stem, path.absolute())
    if name.startswith(("/", "./", "../", "~")) or (
        path.suffix.lower() == ".gguf" and ":" not in name
    ):
        raise ConfigError(
            f"{setting} names {name}, where there is no file or folder; give a GGUF file, the "
            "folder of a model, or a name that can be pulled"
        )
    return Source(name)


def _default_models() -> list[str]:
    from inferneo_jax import load_catalog

    first: dict[str, str] = {}
    for entry in load_catalog().values():
        first.setdefault(entry.kind, entry.name)
    if not first:
        raise CheckpointError("the catalog is empty; name models in INFERNEO_MODELS")
    return list(first.values())
