"""The pool of processes that render chat templates."""

import atexit
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import BoundedSemaphore, Lock

from inferneo_jax.errors import EngineError
from inferneo_jax.text import template_protocol as protocol

WORKERS = 2
"""Number of concurrent renderings; the server has as many threads for text."""
WAIT_FACTOR = 4
"""A worker is killed after this many times the CPU time that a request may take."""
START_SECONDS = 60.0
"""Maximum time for a worker to start; on an idle machine it takes less than 0.1 s."""

_START = (
    "import sys; sys.path += sys.argv[1:]; "
    "from inferneo_jax.text.template_worker import main; main()"
)
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "TZ")


class WorkerEndedError(Exception):
    """The worker ended before it answered; the message says why."""


@dataclass(frozen=True)
class Answer:
    """A worker's answer: its kind (a constant of ``template_protocol``) and its text."""

    kind: bytes
    text: str


class _Worker:
    """One worker process, which only one thread may use at a time."""

    def __init__(self) -> None:
        """Start the process without waiting until it is ready.

        Raises:
            EngineError: the process cannot be started.
        """
        self._command = [sys.executable, "-I", "-S", "-c", _START, *_import_path()]
        self._channel, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(  # noqa: S603  (Python and this package)
                self._command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
                start_new_session=True,  # only the parent handles Ctrl-C and finishes its requests
            )
        except OSError as error:
            self._channel.close()
            raise EngineError(
                f"the process that renders chat templates cannot be started: {error}"
            ) from error
        finally:
            theirs.close()
        self._is_ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_until_ready(self) -> None:
        """Wait until the process has started; this does not count as time of a request.

        Raises:
            EngineError: the process did not start.
        """
        if self._is_ready:
            return
        try:
            kind, _, _ = protocol.ANSWER.unpack(
                self._receive(protocol.ANSWER.size, time.monotonic() + START_SECONDS)
            )
        except (OSError, EOFError) as error:
            self.close()
            raise EngineError(
                "the process that renders chat templates did not start "
                f"(exit code {self._process.returncode}); to see why, run: "
                + shlex.join(self._command)
            ) from error
        self._is_ready = kind == protocol.READY

    def ask(self, source: bytes, context: bytes, seconds: float) -> tuple[Answer, bool]:
        """Send a request; return the answer, and whether the worker exits after it.

        Raises:
            WorkerEndedError: the worker was killed by the kernel, or because it took too long.
        """
        deadline = time.monotonic() + WAIT_FACTOR * seconds
        header = protocol.REQUEST.pack(seconds, len(source), len(context))
        try:
            self._channel.settimeout(WAIT_FACTOR * seconds)
            self._channel.sendall(b"".join((header, source, context)))
            kind, ends, size = protocol.ANSWER.unpack(self._receive(protocol.ANSWER.size, deadline))
            if size > protocol.MAX_BYTES:
                raise OSError(f"an answer of {size} bytes")
            text = self._receive(size, deadline).decode("utf-8", "surrogatepass")
        except TimeoutError:
            self.close()
            raise WorkerEndedError(
                f"it did not end within {WAIT_FACTOR * seconds:g} seconds"
            ) from None
        except (OSError, EOFError, UnicodeDecodeError):
            self.close()
            if self._process.returncode == -signal.SIGPROF:
                raise WorkerEndedError(
                    f"it ran for more than {seconds:g} seconds of CPU time"
                ) from None
            raise WorkerEndedError(
                f"its process ended with code {self._process.returncode}"
            ) from None
        except BaseException:  # such as Ctrl-C: part of an answer may be in transit
            self.close()
            raise
        return Answer(kind, text), bool(ends)

    def _receive(self, size: int, deadline: float) -> bytearray:
        received = bytearray()
        while len(received) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._channel.settimeout(left)
            part = self._channel.recv(min(size - len(received), 1 << 20))
            if not part:
                raise EOFError
            received += part
        return received

    def close(self) -> None:
        """Kill the process and reap it."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Leave the worker to the process that this one was forked from."""
        self._channel.close()
        self._process.returncode = 0


class TemplatePool:
    """A pool of workers that start on demand and are replaced when they end; thread-safe."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._lock = Lock()
        self._free = BoundedSemaphore(WORKERS)
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._is_closed = False

    def start(self) -> None:
        """Start the workers in advance, so that no request waits for one.

        Raises:
            EngineError: a process cannot be started.
        """
        with self._lock:
            while len(self._idle) + len(self._busy) < WORKERS:
                self._idle.insert(0, _Worker())

    def ask(self, source: bytes, context: bytes, seconds: float) -> Answer:
        """Have the next free worker render a template, or only compile it.

        Args:
            source: the source of the template.
            context: the template's variables, as JSON; empty to only compile the template.
            seconds: the CPU time that the request may take.

        Raises:
            WorkerEndedError: the worker was killed; another replaces it.
            EngineError: no worker can be started.
        """
        with self._borrowed() as worker:
            answer, ends = worker.ask(source, context, seconds)
            if ends:
                worker.close()
            return answer

    @contextmanager
    def _borrowed(self) -> Iterator[_Worker]:
        with self._free:
            with self._lock:
                if self._is_closed:
                    raise EngineError("the process that renders chat templates has been ended")
                # The worker used last is the most likely to have compiled this template.
                worker = self._idle.pop() if self._idle else _Worker()
                if worker.has_ended():
                    worker.close()
                    worker = _Worker()
                self._busy.append(worker)
            try:
                worker.wait_until_ready()
                yield worker
            finally:
                with self._lock:
                    self._busy.remove(worker)
                    if not worker.has_ended():
                        self._idle.append(worker)
                    elif not self._is_closed:
                        with suppress(EngineError):  # the next request tries again
                            self._idle.insert(0, _Worker())

    def pids(self) -> list[int]:
        """The process ids of all workers."""
        with self._lock:
            return [worker.pid for worker in (*self._idle, *self._busy)]

    def close(self) -> None:
        """End the workers; the pool cannot be used afterwards."""
        with self._lock:
            self._is_closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
        for worker in workers:
            worker.close()

    def forget(self) -> None:
        """Forget the parent's workers in a forked process, which starts its own."""
        for worker in (*self._idle, *self._busy):
            worker.forget()
        self._clear()


def _import_path() -> list[str]:
    """The folders from which a worker imports everything outside of the standard library.

    Given these, a worker starts without ``site``, which is slower and might not find them.
    """
    found: dict[str, None] = {}
    for name in ("inferneo_jax", "jinja2", "markupsafe"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise EngineError(f"chat templates need {name}, which is not installed")
        found[str(Path(spec.origin).parent.parent)] = None
    return list(found)


POOL = TemplatePool()
"""The workers of this process, shared by all its models."""

atexit.register(POOL.close)
os.register_at_fork(after_in_child=POOL.forget)
