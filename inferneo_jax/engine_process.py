"""The engine's process: ``python -m inferneo_jax.engine_process FD``.

It is started by :class:`~inferneo_jax.engine.remote.EngineProcess`, serves the one process at the
other end of the socket FD, and ends when that is closed.
"""

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from inferneo_jax.config import JobConfig
from inferneo_jax.distributed.job import Job
from inferneo_jax.distributed.transport import Frames
from inferneo_jax.engine import wire
from inferneo_jax.engine.embedder import Embedder
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.served import EmbeddingModel, LanguageModel, Model
from inferneo_jax.engine.wire import Message, Outbox
from inferneo_jax.errors import (
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    InferneoError,
    JobError,
)
from inferneo_jax.model import load_model
from inferneo_jax.platform.memory import malloc_trim
from inferneo_jax.platform.progress import Progress
from inferneo_jax.request import GenerationOutput, OutputSink
from inferneo_jax.runner.model_info import DeviceMemory, device_memory
from inferneo_jax.weights.convert import describe
from inferneo_jax.weights.fetch import Offer, pull

log = logging.getLogger(__name__)

STATE_SECONDS = 0.25
"""How often the state of all models is told."""


class Served:
    """Serves the process at the other end of a connection.

    Args:
        frames: the connection.
        load: loads a model.
    """

    def __init__(self, frames: Frames[Message], load: Callable[..., Model] = load_model) -> None:
        self._frames, self._load_model = frames, load
        self._outbox = Outbox(frames, lambda: None)  # who reads notices it too
        self._models: dict[int, Model] = {}
        self._ids: dict[tuple[int, int], str] = {}
        self._futures: dict[tuple[int, int], Future[Any]] = {}
        self._ended = threading.Event()
        self._job: Job | None = None
        self._memory: list[DeviceMemory] = []
        self._stuck: dict[int, float] = {}

    def run(self) -> None:
        """Serve until the other process says that this is the end, or is gone."""
        handler = _Handler(self._outbox)
        logger = logging.getLogger("inferneo_jax")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        threading.Thread(target=self._tell, name="state", daemon=True).start()
        try:
            while not self._ended.is_set():
                kind, payload = self._frames.receive()
                self._take(kind, orjson.loads(payload))
        except JobError:
            return  # nobody waits for anything any more
        finally:
            logger.removeHandler(handler)
        for model in self._models.values():
            model.stop()
        if self._job:
            self._job.end()

    def _take(self, kind: Message, fields: list[Any]) -> None:
        number, *rest = fields or [None]
        if kind == Message.END:
            self._ended.set()
        elif kind == Message.JOB:
            self._lead(number)
        elif kind == Message.LOAD:
            threading.Thread(target=self._load, args=fields, name="load", daemon=True).start()
        elif kind == Message.OBTAIN:
            threading.Thread(target=self._obtain, args=fields, name="obtain", daemon=True).start()
        elif kind == Message.SUBMIT:
            self._submit(number, *rest)
        elif kind == Message.CHANGE:
            request, change = rest
            if name := self._ids.get((number, request)):
                getattr(self._engine(number), change)(name)
        elif kind == Message.EMBED:
            self._embed(number, *rest)
        elif kind == Message.CANCEL:
            if future := self._futures.get((number, *rest)):
                future.cancel()
        elif kind == Message.STOP:
            threading.Thread(target=self._stop, args=fields, name="stop", daemon=True).start()
        else:
            raise JobError(f"sent {kind.name}, which only this process sends")

    def _lead(self, config: dict[str, Any]) -> None:
        def leave(reason: str) -> None:
            self._outbox.put(Message.LEAVE, [reason])

        def lost(reason: str) -> None:
            self._outbox.put(Message.LOST, [reason])

        self._job = Job(JobConfig(**config), leads=True, on_leave=leave)
        self._job.on_lost(lost)

    def _load(
        self, number: int, path: str, name: str, config: dict[str, Any], draft: str | None
    ) -> None:
        with self._told(number) as progress:
            if self._job:
                self._job.join(progress)
            model = self._load_model(
                Path(path),
                wire.read_config(config),
                name=name,
                progress=progress,
                job=self._job,
                draft=Path(draft) if draft else None,
            )
            self._add(number, model)

    def _obtain(self, number: int, name: str, source: str | None, checkpoints: str) -> None:
        def announce(offer: Offer) -> None:
            log.info("pulling %s", offer)

        with self._told(number) as progress:
            if source:
                path = describe(Path(source), Path(checkpoints), progress)
            else:
                path = pull(name, Path(checkpoints), progress, announce=announce)
            self._outbox.put(Message.OBTAINED, [number, str(path)])

    @contextmanager
    def _told(self, number: int) -> Iterator[Progress]:
        """Tell how far the answer to a question is, or why there will be none."""

        def progress(stage: str, done: int, total: int) -> None:
            self._outbox.put(Message.PROGRESS, [number, stage, done, total])

        try:
            yield progress
        except InferneoError as error:
            self._outbox.put(Message.FAILED, [number, None, error])
        except Exception as error:
            log.exception("loading failed")
            failure = EngineFailedError(f"loading failed: {error}")
            self._outbox.put(Message.FAILED, [number, None, failure])

    def _add(self, number: int, model: Model) -> None:
        # What is loaded stays, and need not be looked through by every full collection.
        gc.collect()
        gc.freeze()
        malloc_trim()
        self._models[number] = model
        generates = isinstance(model, LanguageModel) and isinstance(model.engine, Engine)
        described = {
            "created": model.created,
            "max_len": model.max_len,
            "info": model.info,
            "state": _state(model, 0.0),
            "limits": self._engine(number).limits if generates else None,
            "hidden_size": None if generates else self._embedder(number).hidden_size,
        }
        self._outbox.put(Message.LOADED, [number, described])

    def _submit(self, number: int, request_number: int, fields: dict[str, Any]) -> None:
        request = wire.read_request(fields)
        key = number, request_number
        self._ids[key] = request.id
        sink = self._sink(*key)
        try:
            self._engine(number).submit(request, sink)
        except InferneoError as error:
            failure = error if isinstance(error, EngineError) else EngineFailedError(str(error))
            sink(GenerationOutput(finish_reason="error", error=failure))

    def _sink(self, number: int, request: int) -> OutputSink:
        first = True

        def sink(output: GenerationOutput) -> None:
            nonlocal first
            if output.finish_reason:
                self._tell_state()  # first: who sees the end of a request sees its place free
            written = wire.write_output(number, request, output, first=first)
            first = False
            self._outbox.put(Message.OUTPUTS, written)
            if output.finish_reason:
                self._ids.pop((number, request), None)

        return sink

    def _embed(self, number: int, request: int, texts: list[list[int]], owner: str) -> None:
        def answer(future: "Future[Any]") -> None:
            self._futures.pop((number, request), None)
            if future.cancelled():
                return
            if error := future.exception():
                known = error if isinstance(error, InferneoError) else EngineFailedError(str(error))
                self._outbox.put(Message.FAILED, [number, request, known])
            else:
                vectors = wire.write_vectors(number, request, future.result())
                self._outbox.put(Message.VECTORS, vectors)

        try:
            future = self._embedder(number).embed(texts, owner)
        except InferneoError as error:
            return self._outbox.put(Message.FAILED, [number, request, error])
        self._futures[number, request] = future
        return future.add_done_callback(answer)

    def _stop(self, number: int) -> None:
        self._models[number].stop()
        self._tell_state()
        self._outbox.put(Message.STOPPED, [number])

    def _tell(self) -> None:
        """Tell the state of everything again and again."""
        while not self._ended.wait(STATE_SECONDS):
            self._memory = device_memory() if self._models else []
            self._stuck = {number: model.stuck() for number, model in list(self._models.items())}
            self._tell_state()

    def _tell_state(self) -> None:
        # Called by sinks, which may be called by who watches over a step and holds its lock: how
        # long the step has been stuck is not asked for here.
        states = [
            [number, _state(model, self._stuck.get(number, 0.0))]
            for number, model in list(self._models.items())
        ]
        self._outbox.put(Message.STATE, [states, self._memory])

    def _engine(self, number: int) -> Engine:
        model = self._models[number]
        assert isinstance(model, LanguageModel)
        assert isinstance(model.engine, Engine)
        return model.engine

    def _embedder(self, number: int) -> Embedder:
        model = self._models[number]
        assert isinstance(model, EmbeddingModel)
        assert isinstance(model.embedder, Embedder)
        return model.embedder


def _state(model: Model, stuck: float) -> dict[str, Any]:
    """What is told of a model; see :class:`~inferneo_jax.engine.remote.State`."""
    engine = model.engine if isinstance(model, LanguageModel) else None
    known: Any = [0.0, ()]
    end: EngineError | None = None
    if isinstance(engine, Engine):
        end, known = engine.end, engine.measured
    elif model.ended():
        end = EngineStoppedError("the embedding model was stopped")
    return {"stats": model.stats(), "stuck": stuck, "known": known, "end": end}


class _Handler(logging.Handler):
    """Hands what is logged to the other process, which has one log for both."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, with its traceback as text."""
        self._outbox.put(Message.LOG, [record.levelno, record.name, self.format(record)])


def main(load: Callable[..., Model] = load_model) -> None:
    """Serve the process that started this one."""
    # A terminal or a supervisor tells all processes to end; this one ends after the other. Blocked
    # and not ignored, because libtpu sets handlers of its own. Threads inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    Served(Frames(socket.socket(fileno=int(sys.argv[1])), Message), load).run()
    sys.stderr.flush()
    os._exit(0)  # neither a compiler nor a step that hangs may hold it up


if __name__ == "__main__":
    main()
