"""The models named in the settings, loaded in the background and looked up by name."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import structlog
from pydantic import Field
from typing_extensions import TypedDict

from inferneo_jax import InferneoError
from server.config.schema import ParserName
from server.config.settings import Settings
from server.http.errors import RETRY_LOADING_SECONDS, ApiError, bad_request, unavailable
from server.http.schema import Count
from server.models.sources import Loader, Source, draft_source, load_from_disk, sources_of

if TYPE_CHECKING:
    from inferneo_jax import EmbeddingModel, EngineProcess, Job, LanguageModel, Model

log = structlog.get_logger(__name__)

LOST_SECONDS = 30.0
"""How long a step may exceed its limit before its model counts as lost."""

_SERVES = {
    "generate": "generates text and makes no embeddings; use /v1/chat/completions or "
    "/v1/completions.",
    "embed": "makes embeddings and no text; use /v1/embeddings.",
}
"""What a model does, by its task, for the error of a caller who wants something else."""


class Progress(TypedDict):
    """The progress of loading a model."""

    id: Annotated[str, Field(description="The model's own id.")]
    stage: Annotated[str, Field(description="The current stage.")]
    done: Annotated[Count, Field(description="Units of work done in this stage.")]
    total: Annotated[Count, Field(description="Units of work in this stage; 0 if unknown.")]


@dataclass
class _Entry:
    source: Source
    model: "Model | None" = None
    stage: str = "waiting"
    done: int = 0
    total: int = 0


class _StopLoading(BaseException):
    """Unwinds the loading thread; not an Exception, so that nothing on the way catches it."""


class Registry:
    """The models by id and alias, and the progress of their loading."""

    def __init__(
        self,
        settings: Settings,
        loader: Loader = load_from_disk,
        check_access: Callable[[Any, str], None] = lambda caller, name: None,
        job: "Job | None" = None,
        process: "EngineProcess | None" = None,
    ) -> None:
        """Name the models; ``check_access`` raises if a caller may not use one.

        ``job``: of the processes that run a model with this one; to be ended with the models.
        ``process``: the one that runs the models; to be ended after them.

        Raises:
            ConfigError: the settings' names do not go together.
        """
        self._settings = settings
        self._loader = loader
        self._check_access = check_access
        self._job, self._process = job, process
        draft_source(settings)  # a wrong name is told at once
        self._entries = {source.id: _Entry(source) for source in sources_of(settings)}
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def output_parser(self) -> ParserName:
        """The format of calls and reasoning that the settings name for all models, or ``auto``."""
        return self._settings.output_parser

    @property
    def ready(self) -> bool:
        """Whether every model is loaded and its engine runs."""
        return all(entry.model and entry.model.ready() for entry in self._entries.values())

    @property
    def loaded(self) -> bool:
        """Whether every model is loaded."""
        return all(entry.model for entry in self._entries.values())

    @property
    def in_job(self) -> bool:
        """Whether other processes run a model together with this one."""
        return bool(self._job or (self._process and self._process.in_job))

    def lost(self) -> str | None:
        """Why some model will never serve again; None if none is lost."""
        return self.job_lost() or next(filter(None, map(_lost, self.models())), None)

    def job_lost(self) -> str | None:
        """Why the job with other processes has ended; None if it has not, or there is none."""
        if self._process:
            return self._process.job_lost
        return self._job.lost if self._job else None

    def models(self) -> list["Model"]:
        """The models that are loaded."""
        return [entry.model for entry in self._entries.values() if entry.model]

    def progress(self) -> list[Progress]:
        """The loading stage of each model; ``ready`` is the last."""
        return [
            {"id": entry.source.id, "stage": entry.stage, "done": entry.done, "total": entry.total}
            for entry in self._entries.values()
        ]

    def get(self, name: str, caller: object) -> "Model":
        """The model of this id or alias, for a caller.

        Raises:
            ApiError: there is none, it is still being loaded, or the caller may not use it.
        """
        self._check_access(caller, name)
        entry = self._entries.get(self._settings.aliases.get(name, name))
        if entry is None:
            known = ", ".join([*self._entries, *self._settings.aliases])
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist; there are: {known}.",
                param="model",
                code="model_not_found",
            )
        if entry.model is None:
            raise still_loading()
        return entry.model

    def language_model(self, name: str, caller: object) -> "LanguageModel":
        """The model of this name, which generates.

        Raises:
            ApiError: there is none, it is still being loaded, or it serves another task.
        """
        return cast("LanguageModel", self._serving("generate", name, caller))

    def embedding_model(self, name: str, caller: object) -> "EmbeddingModel":
        """The model of this name, which embeds.

        Raises:
            ApiError: there is none, it is still being loaded, or it serves another task.
        """
        return cast("EmbeddingModel", self._serving("embed", name, caller))

    def _serving(self, task: str, name: str, caller: object) -> "Model":
        model = self.get(name, caller)
        if model.task != task:
            raise bad_request(f"The model {name} {_SERVES[model.task]}", "model")
        return model

    async def load(self) -> None:
        """Load all models at once, in threads, without blocking the event loop.

        The processes of a job meet in each model, so there it is one after the other.

        Raises:
            InferneoError: one of them cannot be served.
        """
        loop = asyncio.get_running_loop()
        entries = [[entry] for entry in self._entries.values()]
        if self.in_job:
            entries = [list(self._entries.values())]
        loaded: list[asyncio.Future[None]] = [loop.create_future() for _ in entries]

        def settle(future: asyncio.Future[None], error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        def work(entries: list[_Entry], future: asyncio.Future[None]) -> None:
            error: Exception | None = None
            try:
                for entry in entries:
                    self._load(entry)
            except _StopLoading:
                return
            except Exception as caught:  # noqa: BLE001  (handed to the awaiting coroutine)
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(settle, future, error)

        # Daemons: a compiler or a download that does not return must not hold up the exit.
        self._threads = [
            threading.Thread(target=work, args=each, name="load", daemon=True)
            for each in zip(entries, loaded, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        await asyncio.gather(*loaded)

    def stop(self, seconds: float = 10.0) -> None:
        """Stop the loading, if it still runs, and every engine. Blocks."""
        self._stopping.set()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for model in self.models():
            model.stop()
        if self._job:
            self._job.end()
        if self._process:
            self._process.end()

    def _load(self, entry: _Entry) -> None:
        name, last = entry.source.id, ""

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last
            if self._stopping.is_set():
                raise _StopLoading
            entry.stage, entry.done, entry.total = stage, done, total
            if stage != last:
                log.info("loading", model=name, stage=stage)
                last = stage

        progress("loading", 0, 0)
        try:
            model = self._loader(entry.source, self._settings, progress)
        except InferneoError as error:
            text = str(error)
            raise type(error)(text if text.startswith(name) else f"{name}: {text}") from error
        entry.stage, entry.done, entry.total = "ready", 1, 1
        entry.model = model
        log.info("loaded", model=name)
        if self._stopping.is_set():
            model.stop()
            raise _StopLoading


def still_loading() -> ApiError:
    """The error while models are being loaded."""
    return unavailable(
        "The models are still being loaded; GET /ready says how far that is. Send the request "
        "again later.",
        "model_loading",
        RETRY_LOADING_SECONDS,
    )


def _lost(model: "Model") -> str | None:
    if (seconds := model.stuck()) > LOST_SECONDS:
        return f"{model.name} has not answered for {seconds:.0f} s"
    return f"{model.name} has failed for good" if model.ended() else None
