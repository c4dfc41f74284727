"""A server in a child process, for the duration of a chat."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import orjson
from rich.console import Console

from server.cli.chat.client import ChatError, Server
from server.cli.progress import ModelProgress
from server.config.schema import variable_of
from server.config.settings import Settings
from server.process.child import OURS, Child

_LOOK_SECONDS = 0.2
_OF_SEVERAL = (
    "coordinator",
    "num_processes",
    "process_id",
    "job_token",
    "prefill_listen",
    "prefill_servers",
    "prefill_token",
)
"""Settings of servers that work together; this one is alone."""


@contextlib.contextmanager
def local_server(model: str | None, settings: Settings, err: Console) -> Iterator[Server]:
    """Start a server and yield it once it is ready; it ends with the block, or with this process.

    Args:
        model: the model to serve; None for those of the settings, or the catalog's first chat
            model.
        settings: the settings, which the server reads itself from the environment and the file.
        err: the console to show progress on.

    Raises:
        ChatError: the server ends before it is ready; with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="inferneo-") as folder:
        child = Child(OURS, _environment(model, settings, folder))
        try:
            server = Server(child.url)
            server.started_here = True
            for _ in waiting(server, err, started=False):
                if not child.is_running:
                    raise ChatError(f"The server ended before it was ready: {_why(child)}")
            yield server
        finally:
            child.end()


def waiting(server: Server, err: Console, *, started: bool) -> Iterator[None]:
    """Show the progress of a server's models until they are loaded; yields while they are not.

    Args:
        server: the server to wait for.
        err: the console to show progress on.
        started: whether the server already answers.
    """
    rows: list[dict[str, Any]] = []
    with ModelProgress(err, lambda: rows):
        while True:
            states = server.states()
            rows = [state for state in states if "stage" in state]
            if not rows and (states or started):
                return
            yield
            time.sleep(_LOOK_SECONDS)


def _why(child: Child) -> str:
    """Return the reason of the last error in a log, or else the end of the log."""
    for line in reversed(child.log.splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            event = orjson.loads(line)
            if event["level"] == "error":
                return str(event["reason"])
    return f"\n{child.tail}"


def _environment(model: str | None, settings: Settings, folder: str) -> dict[str, str]:
    """Return its environment: without keys, so it serves only this machine, and without a job."""
    if model is None and not settings.models:
        from inferneo_jax import load_catalog

        model = next(each.name for each in load_catalog().values() if each.kind == "chat")
    chosen = {"models": model, "aliases": ""} if model else {}
    chosen |= {"keys_db": f"{folder}/keys.db", "require_key": "auto", "log_format": "json"}
    job = {variable_of(name) for name in _OF_SEVERAL}
    kept = {name: value for name, value in os.environ.items() if name not in job}
    return kept | {variable_of(name): value for name, value in chosen.items()}
