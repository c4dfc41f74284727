"""Engines in a process of their own, used from this one; it needs no jax.

A Python interpreter runs one thread at a time, so an engine and a web server in one process take
turns. Here the engine's process has an interpreter to itself. It is a child of this process, and
ends with it: they are connected by a pair of sockets that nobody else can reach.
"""

import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Texts
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import orjson

from inferneo_jax.config import EngineConfig, JobConfig
from inferneo_jax.distributed.transport import Frames
from inferneo_jax.engine import wire
from inferneo_jax.engine.forecast import Forecast, Measured
from inferneo_jax.engine.served import EmbeddingModel, LanguageModel, Model
from inferneo_jax.engine.wire import Message
from inferneo_jax.errors import (
    EngineFailedError,
    EngineStoppedError,
    InferneoError,
    JobError,
    OverloadedError,
    RequestError,
)
from inferneo_jax.platform.progress import Progress, silent
from inferneo_jax.request import (
    EngineStats,
    EngineTotals,
    GenerationRequest,
    OutputSink,
    RequestLimits,
)
from inferneo_jax.runner.model_info import DeviceMemory, ModelInfo
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.text.grammar import GrammarCompiler
from inferneo_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "inferneo_jax.engine_process")
"""Starts an engine's process; the number of its socket is appended."""
SILENCE_SECONDS = 5.0
"""A process that tells its state four times a second hangs if it has said nothing for this long."""
_LOOK_SECONDS = 0.25
_STOP_SECONDS = 60.0
_END_SECONDS = 10.0


@dataclass(slots=True)
class State:
    """What a model's process said of it last; replaced as a whole, never changed.

    Attributes:
        stats: of an engine that generates.
        known: what its forecast has measured.
        stuck: seconds by which its step has exceeded its limit.
        end: why it ended for good, None while it has not.
    """

    stats: EngineStats | None = None
    known: Measured = 0.0, ()
    stuck: float = 0.0
    end: InferneoError | None = None

    @classmethod
    def read(cls, fields: dict[str, Any]) -> "State":
        """Read a state from a message."""
        stats, (pace, lengths), end = fields["stats"], fields["known"], fields["end"]
        return cls(
            stats and EngineStats(**stats),
            (pace, tuple(lengths)),
            fields["stuck"],
            end and wire.read_error(end),
        )


class _Remote:
    """One model of an engine's process."""

    def __init__(self, process: "EngineProcess", number: int, state: State) -> None:
        self._process, self._number = process, number
        self._state = state
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._stopped = threading.Event()

    def stuck(self) -> float:
        """Seconds by which the current step, or a sign of life, is late. Thread-safe."""
        return max(self._state.stuck, self._process.silence())

    def ended(self) -> bool:
        """Whether the engine, or its process, is gone for good. Thread-safe."""
        return bool(self._state.end or self._process.lost)

    def stop(self) -> None:
        """End every request, and wait until the process has said so. Thread-safe."""
        self._process.put(Message.STOP, [self._number])
        self._stopped.wait(_STOP_SECONDS)

    def told(self, state: State) -> None:
        """Take what the process says of this model."""
        self._state = state

    def stopped(self) -> None:
        """The process has stopped this model."""
        self._stopped.set()

    def _refusal(self) -> InferneoError | None:
        """Why a request cannot be accepted now."""
        if self._state.end:
            return self._state.end
        return EngineFailedError(self._process.lost) if self._process.lost else None


class RemoteEngine(_Remote):
    """An engine that generates in another process; see :class:`~inferneo_jax.engine.engine.Engine`.

    What is wrong with a request is raised here, by the limits of the engine. What makes the engine
    refuse it comes as its output, if the engine's last state did not tell.
    """

    def __init__(
        self, process: "EngineProcess", number: int, state: State, limits: RequestLimits
    ) -> None:
        super().__init__(process, number, state)
        self._limits = limits
        self._sequences: dict[int, Sequence] = {}
        self._by_id: dict[str, int] = {}
        assert state.stats
        self._forecast = Forecast(state.stats.slots)

    def submit(self, request: GenerationRequest, sink: OutputSink) -> None:
        """Queue a request; its outputs go to the sink, the last with a finish reason.

        Thread-safe. The sink is called on the thread that reads from the engine's process.

        Raises:
            RequestError: it can never be served; ContextLengthError when it is too long.
            OverloadedError: a step hangs.
            EngineStoppedError: the engine was stopped; EngineFailedError: it failed for good.
        """
        self._limits.check(request)
        with self._lock:
            if refusal := self._refusal():
                raise refusal
            if self.stuck():
                raise OverloadedError("the engine does not answer; try again later")
            if request.id in self._by_id:
                raise RequestError(f"a request with id {request.id} is already under way", "id")
            number = next(self._numbers)
            self._sequences[number] = Sequence(request, sink, number)
            self._by_id[request.id] = number
            self._process.put(Message.SUBMIT, [self._number, number, request])

    def abort(self, request_id: str) -> None:
        """End a request before the next step, if it still runs. Thread-safe."""
        self._change(request_id, "abort")

    def pause(self, request_id: str) -> None:
        """Decode no further tokens of a request until ``resume``. Thread-safe, idempotent."""
        self._change(request_id, "pause")

    def resume(self, request_id: str) -> None:
        """Undo ``pause``. Thread-safe, idempotent."""
        self._change(request_id, "resume")

    def stats(self) -> EngineStats:
        """The engine's numbers, at most a quarter of a second old. Thread-safe."""
        stats = self._state.stats
        assert stats
        if self.ended():
            return replace(stats, ready=False)
        return stats

    def forecast(self, requests: list[GenerationRequest]) -> float | None:
        """Seconds until these would have finished, if they were submitted now. Thread-safe.

        It is computed here, from what the engine has measured and the requests of this process.
        """
        stats = self._state.stats
        assert stats
        totals = EngineTotals(**{n: getattr(stats, n) for n in EngineTotals.__slots__})
        with self._lock:
            live = list(self._sequences.values())
        return self._forecast.seconds(live, requests, totals, stats.prefill_allowance)

    def told(self, state: State) -> None:
        """Take what the process says of this model."""
        super().told(state)
        self._forecast.measured = state.known

    def deliver(self, number: int, output: list[Any]) -> None:
        """Deliver an output; called on one thread only."""
        if (sequence := self._sequences.get(number)) is None:
            return
        if len(output) > 2 and output[2]:  # a reason to end
            self._forget(number)
        wire.deliver(sequence, *output)

    def fail(self, error: EngineFailedError) -> None:
        """End every request, since the process is gone."""
        with self._lock:  # whoever is submitting has added its request, or sees that it is gone
            left = list(self._sequences.items())
        for number, sequence in left:
            self._forget(number)
            sequence.deliver(reason="error", error=error)

    def _forget(self, number: int) -> None:
        with self._lock:
            self._by_id.pop(self._sequences.pop(number).request.id)

    def _change(self, request_id: str, change: str) -> None:
        with self._lock:
            if (number := self._by_id.get(request_id)) is not None:
                if change != "abort":
                    self._sequences[number].paused = change == "pause"
                self._process.put(Message.CHANGE, [self._number, number, change])


class RemoteEmbedder(_Remote):
    """An engine that embeds in another process; see :class:`~.embedder.Embedder`.

    Everything that is wrong with texts is the exception of their future.
    """

    def __init__(
        self,
        process: "EngineProcess",
        number: int,
        state: State,
        hidden_size: int,
        max_tokens: int,
    ) -> None:
        super().__init__(process, number, state)
        self.hidden_size, self.max_tokens = hidden_size, max_tokens
        self._futures: dict[int, Future[np.ndarray[Any, np.dtype[np.float32]]]] = {}

    def embed(
        self, texts: Texts[Texts[int]], owner: str = ""
    ) -> "Future[np.ndarray[Any, np.dtype[np.float32]]]":
        """Queue texts; the future's result is float32 ``[texts, hidden_size]``. Thread-safe.

        Raises:
            EngineError: the engine was stopped, or is gone.
        """
        future: Future[np.ndarray[Any, np.dtype[np.float32]]] = Future()
        with self._lock:
            if refusal := self._refusal():
                raise refusal
            number = next(self._numbers)
            self._futures[number] = future
            self._process.put(Message.EMBED, [self._number, number, texts, owner])

        def cancel(ended: "Future[Any]") -> None:
            waited = self._futures.pop(number, None) if ended.cancelled() else None
            if waited is not None:
                self._process.put(Message.CANCEL, [self._number, number])

        future.add_done_callback(cancel)
        return future

    def answer(
        self, number: int, found: "np.ndarray[Any, np.dtype[np.float32]] | InferneoError"
    ) -> None:
        """Take the vectors of a request, or why there are none."""
        if (future := self._futures.pop(number, None)) is None:
            return
        with suppress(InvalidStateError):  # it was cancelled just now
            if isinstance(found, InferneoError):
                future.set_exception(found)
            else:
                future.set_result(found)

    def fail(self, error: EngineFailedError) -> None:
        """End every request, since the process is gone."""
        with self._lock:
            left = list(self._futures)
        for number in left:
            self.answer(number, error)


class EngineProcess:
    """The process that runs the engines of all models. It is started for the first of them.

    Args:
        command: starts the process.
        job: of several processes that run a language model together, which the process leads.
        on_leave: called when a follower of the job was told to end, with a sentence that says so.

    Attributes:
        lost: why it can serve nothing any more; None while it can.
        job_lost: why the job cannot go on; None while it can, or there is none.
        device_memory: what it said last of its accelerators.
    """

    def __init__(
        self,
        command: Texts[str] = COMMAND,
        job: JobConfig | None = None,
        on_leave: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.lost: str | None = None
        self.job_lost: str | None = None
        self._job, self._on_leave = job, on_leave
        self.device_memory: list[DeviceMemory] = []
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._ending = False
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: Frames[Message]
        self._outbox: wire.Outbox
        self._reader: threading.Thread
        self._numbers = itertools.count()
        self._asked: dict[int, SimpleQueue[tuple[Message, list[Any]] | None]] = {}
        self._models: dict[int, RemoteEngine | RemoteEmbedder] = {}
        self._quiet = 0.0

    @property
    def in_job(self) -> bool:
        """Whether other processes run a model together with this one."""
        return self._job is not None

    @property
    def pid(self) -> int | None:
        """The number of the process; None before it is started."""
        return self._process.pid if self._process else None

    def silence(self) -> float:
        """Seconds by which a sign of life is late. Thread-safe."""
        return max(0.0, self._quiet - SILENCE_SECONDS)

    def load(
        self,
        path: Path,
        config: EngineConfig,
        *,
        name: str,
        progress: Progress | None = None,
        draft: Path | None = None,
    ) -> Model:
        """Load a converted checkpoint, as ``load_model`` does, in the process. Blocks.

        Raises:
            CheckpointError: the folder holds no usable model.
            ConfigError: the model does not fit the configuration.
            EngineFailedError: the process is gone.
        """
        fields = [str(path), name, config, draft and str(draft)]
        with ThreadPoolExecutor(1, "tokenizer") as pool:
            tokenizer = pool.submit(Tokenizer.from_directory, path)
            number, found = self._ask(Message.LOAD, fields, progress)
        shared: dict[str, Any] = {
            "name": name,
            "created": found["created"],
            "tokenizer": tokenizer.result(),
            "max_len": found["max_len"],
            "info": ModelInfo(**found["info"]),
            "device_memory": lambda: self.device_memory,
        }
        remote = self._models[number]
        if isinstance(remote, RemoteEngine):
            grammars = GrammarCompiler.of(shared["tokenizer"])
            return LanguageModel(**shared, engine=remote, grammars=grammars)
        return EmbeddingModel(**shared, embedder=remote)

    def obtain(
        self, name: str, source: Path | None, checkpoints: Path, progress: Progress | None = None
    ) -> Path:
        """Describe a model's files, or pull the model of this name, in the process. Blocks.

        Raises:
            CheckpointError: it cannot be had.
            EngineFailedError: the process is gone.
        """
        fields = [name, source and str(source), str(checkpoints)]
        return Path(self._ask(Message.OBTAIN, fields, progress)[1])

    def _ask(self, kind: Message, fields: list[Any], progress: Progress | None) -> tuple[int, Any]:
        """The number of a question and its answer. Starts the process if need be; blocks."""
        answers: SimpleQueue[tuple[Message, list[Any]] | None] = SimpleQueue()
        with self._lock:
            self._start()
            number = next(self._numbers)
            self._asked[number] = answers
            if self.lost:
                answers.put(None)
        self.put(kind, [number, *fields])
        while (answer := answers.get()) and answer[0] == Message.PROGRESS:
            (progress or silent)(*answer[1])
        if answer is None:
            raise EngineFailedError(self.lost)
        if answer[0] == Message.FAILED:
            raise wire.read_error(answer[1][0])
        return number, answer[1][0]

    def put(self, kind: Message, payload: list[Any]) -> None:
        """Send a message; without effect once the process is gone. Thread-safe."""
        if not self.lost:
            self._outbox.put(kind, payload)

    def end(self) -> None:
        """End the process, and kill it if it does not end by itself. Idempotent, blocks."""
        with self._lock:
            self._ending = True
            process = self._process
        if process is None:
            return
        self.put(Message.END, [])
        try:
            process.wait(_END_SECONDS + (self._job.end_seconds if self._job else 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join()
        self._frames.close()

    def _start(self) -> None:
        if self._process:
            return
        if self._ending:
            raise EngineStoppedError("the engine was stopped")
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*self._command, str(theirs.fileno())]
            self._process = subprocess.Popen(  # noqa: S603 - this program's own command
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self._frames = Frames(ours, Message)
        self._outbox = wire.Outbox(self._frames, lambda: None)  # who reads notices it too
        self._reader = threading.Thread(target=self._read, name="engine process", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, name="engine watch", daemon=True).start()
        if self._job:
            self.put(Message.JOB, [self._job])

    def _read(self) -> None:
        """The thread that reads from the process, until it is gone."""
        try:
            while True:
                kind, payload = self._frames.receive()
                self._quiet = 0.0
                self._take(kind, payload)
        except JobError:
            pass
        except Exception:
            log.exception("a message of the engine's process cannot be read")
            self._frames.close()
        self._lose()

    def _watch(self) -> None:
        """Count the time without a message; time in which this process stood still is not."""
        while not self.lost:
            time.sleep(_LOOK_SECONDS)
            self._quiet += _LOOK_SECONDS

    def _take(self, kind: Message, payload: bytes) -> None:
        if kind == Message.VECTORS:
            number, request, vectors = wire.read_vectors(payload)
            self._embedder(number).answer(request, vectors)
            return
        fields = orjson.loads(payload)
        if kind == Message.OUTPUTS:
            for number, request, *output in fields:
                cast(RemoteEngine, self._models[number]).deliver(request, output)
        elif kind == Message.STATE:
            states, memory = fields
            for number, state in states:
                if remote := self._models.get(number):
                    remote.told(State.read(state))
            self.device_memory = [DeviceMemory(**each) for each in memory]
        elif kind == Message.LOG:
            level, name, text = fields
            logging.getLogger(name).log(level, "%s", text)
        elif kind == Message.LEAVE:
            self._on_leave(fields[0])
        elif kind == Message.LOST:
            self.job_lost = fields[0]
        elif kind == Message.STOPPED:
            self._models[fields[0]].stopped()
        elif kind == Message.FAILED and fields[1] is not None:
            self._embedder(fields[0]).answer(fields[1], wire.read_error(fields[2]))
        elif kind == Message.FAILED:
            self._asked.pop(fields[0]).put((kind, fields[2:]))
        elif kind == Message.LOADED:
            number, found = fields
            state = State.read(found["state"])
            if found["limits"]:
                limits = RequestLimits(**found["limits"])
                self._models[number] = RemoteEngine(self, number, state, limits)
            else:
                sizes = found["hidden_size"], found["max_len"]
                self._models[number] = RemoteEmbedder(self, number, state, *sizes)
            self._asked.pop(number).put((kind, [found]))
        elif kind == Message.OBTAINED:
            self._asked.pop(fields[0]).put((kind, fields[1:]))
        else:
            self._asked[fields[0]].put((kind, fields[1:]))

    def _embedder(self, number: int) -> RemoteEmbedder:
        return cast(RemoteEmbedder, self._models[number])

    def _lose(self) -> None:
        """The process is gone: whatever waits for it ends."""
        assert self._process
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        with self._lock:
            code = self._process.returncode
            how = "does not answer" if code is None else f"ended with code {code}"
            self.lost = "the engine was stopped" if self._ending else f"the engine's process {how}"
            waiting = list(self._asked.values())
        if not self._ending:
            log.error("%s", self.lost)
        for answers in waiting:
            answers.put(None)
        for remote in list(self._models.values()):
            remote.fail(EngineFailedError(self.lost))
            remote.stopped()
