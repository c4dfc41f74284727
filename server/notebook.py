"""A server beside a notebook: started from a cell, asked from the next ones, stopped at the end."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from server.child import free_port
from server.commands.listening import url_of
from server.setting import variable_of
from server.settings import Settings

_STEP_SECONDS = 0.5
_TAIL = 2000
"""Characters of the log that an error shows."""


class Server:
    """`inferneo serve` in a process of its own, on a free port of this machine unless one is given.

    Starting returns once it is ready, after models are fetched and compiled.

    Args:
        timeout: seconds to wait for that.
        settings: of the server, by their names: ``slots=8, mesh="data=1,model=8"``.

    Attributes:
        url: where the OpenAI API lies; the ``base_url`` of its clients.

    Raises:
        ValueError: there is no such setting.
        RuntimeError: it ended, or was not ready in time; with the end of its log.
    """

    def __init__(self, timeout: float = 1800.0, **settings: object) -> None:
        if unknown := settings.keys() - Settings.model_fields.keys():
            known = ", ".join(Settings.model_fields)
            raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; there are {known}")
        settings = {"host": "127.0.0.1", "port": free_port()} | settings
        address = url_of(str(settings["host"]), int(str(settings["port"])))
        self.url = f"{address}/v1"
        self._log = Path(tempfile.mkdtemp(prefix="inferneo-")) / "server.log"
        variables = {variable_of(name): str(value) for name, value in settings.items()}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "serve"],
                env=os.environ | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait(f"{address}/ready", time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """Let requests finish, and end it."""
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait(self, ready: str, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log[-_TAIL:]}")
            try:
                with urllib.request.urlopen(ready, timeout=5) as answer:  # noqa: S310 - our own
                    json.load(answer)
                return
            except (urllib.error.URLError, TimeoutError, OSError):
                time.sleep(_STEP_SECONDS)
        raise RuntimeError(f"the server is not ready yet:\n{self.log[-_TAIL:]}")
