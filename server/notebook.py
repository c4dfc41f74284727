"""A server for a notebook: start it in one cell, use it in the next ones, stop it at the end."""

import os
from types import TracebackType
from typing import Self

from server.config.schema import variable_of
from server.config.settings import Settings
from server.process.child import END_SECONDS, OURS, Child

_SLACK_SECONDS = 5.0
"""How long the shutdown may take after the last request has finished."""


class Server:
    """A server in a child process, on a free port of this machine unless one is given.

    The constructor returns once the server is ready, with its models fetched and compiled. On
    Linux, the server ends with the notebook's kernel, even if that is killed.

    Args:
        timeout: seconds to wait until the server is ready.
        settings: settings of the server by name, such as ``slots=8, mesh="data=1,model=8"``.

    Attributes:
        url: the URL of the OpenAI API; the ``base_url`` of clients.

    Raises:
        ValueError: a setting does not exist.
        OSError: the given address is in use.
        RuntimeError: the server ended, or was not ready in time; the message ends with its log.
    """

    def __init__(self, timeout: float = 1800.0, **settings: object) -> None:
        if unknown := settings.keys() - Settings.model_fields.keys():
            known = ", ".join(Settings.model_fields)
            raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; there are {known}")
        settings = {"host": "127.0.0.1", "port": 0} | settings
        drain = settings.get("drain_seconds", Settings.model_fields["drain_seconds"].default)
        self._end_seconds = max(END_SECONDS, float(str(drain)) + _SLACK_SECONDS)
        variables = {variable_of(name): str(value) for name, value in settings.items()}
        host, port = str(settings["host"]), int(str(settings["port"]))
        self._child = Child(OURS, os.environ | variables, host, port)
        self.url = f"{self._child.url}/v1"
        try:
            if failure := self._child.wait("/ready", timeout):
                raise RuntimeError(f"the server {failure}:\n{self._child.tail}")
        except BaseException:
            self.stop()
            raise

    @property
    def log(self) -> str:
        """The server's log so far; it can still be read after the server has ended."""
        return self._child.log

    def stop(self) -> None:
        """Let running requests finish and end the server; it is killed if that takes too long."""
        self._child.end(self._end_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()
