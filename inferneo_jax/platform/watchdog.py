"""Notices a step that does not return."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from inferneo_jax.errors import EngineFailedError

PATIENCE = 10.0
"""A step hangs when it takes so many times as long as the slowest did at start."""
_LOOK_SECONDS = 0.25


class Heartbeat:
    """A context manager around each step of one thread, and a thread that watches it.

    A step hangs once it has run for ``limit`` seconds. Then ``on_hang`` is called once, on the
    watching thread, while the step's thread is held in the step: it cannot return before
    ``on_hang`` has, and then the context manager raises :class:`EngineFailedError`.

    Time in which the whole process stood still does not count: only what the watcher saw pass.
    """

    def __init__(self, name: str, limit: float, on_hang: Callable[[], None]) -> None:
        self.limit = limit
        self._on_hang = on_hang
        self._lock = threading.Lock()
        self._running = self._hung = False
        self._age = 0.0
        self._stopped = threading.Event()
        self._look = min(_LOOK_SECONDS, limit / 8)
        self._watcher = threading.Thread(target=self._watch, name=f"{name} watch", daemon=True)
        self._watcher.start()

    def __enter__(self) -> None:
        with self._lock:
            self._running, self._hung, self._age = True, False, 0.0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._running = False
            if self._hung:
                raise EngineFailedError(f"a step took longer than {self.limit:.1f} s") from error

    def late(self) -> float:
        """Seconds by which the current step has exceeded the limit; 0.0 if it has not."""
        with self._lock:
            return max(0.0, self._age - self.limit) if self._running else 0.0

    def condemn(self) -> bool:
        """Treat the current step as hanging; False if there is none."""
        with self._lock:
            return self._condemn()

    def _condemn(self) -> bool:
        if self._running and not self._hung:
            self._hung = True
            self._on_hang()
        return self._running

    def stop(self) -> None:
        """End the watching."""
        self._stopped.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._look):
            now = time.monotonic()
            with self._lock:
                # A step that began since the last look is younger; it errs on the safe side only
                # by one look.
                self._age += min(now - last, 2 * self._look)
                # Under the same lock, or the step that is condemned could be the next one.
                if self._age > self.limit:
                    self._condemn()
            last = now
