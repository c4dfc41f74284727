"""Ends the process with an exit code that says that it failed."""

import multiprocessing
import os
import signal
import sys
from typing import NoReturn

from hypercorn.config import Config


def exit_failed(message: str | None = None, *, at_once: bool = False) -> NoReturn:
    """End this process with the exit code 1, and Hypercorn's main process with it.

    ``hypercorn server.app:app`` serves in a child process, and (0.18) ends with exit code 0
    whatever the child's was. Of all that reaches it from here only a signal that it does not handle
    makes it end otherwise; a supervisor or a script then sees that the server failed.

    ``at_once`` neither waits nor cleans up, for a process with a thread that may never return.
    """
    if message is not None:
        print(message, file=sys.stderr, flush=True)
    # With more workers than this one the others would be left without a parent.
    if (config := _hypercorn()) and config.workers == 1:
        os.kill(os.getppid(), signal.SIGUSR1)
    if at_once:
        sys.stderr.flush()
        os._exit(1)
    raise SystemExit(1)


def end_orderly() -> None:
    """Have this server drain and end, as it does on SIGTERM."""
    os.kill(os.getppid() if _hypercorn() else os.getpid(), signal.SIGTERM)


def _hypercorn() -> Config | None:
    """The configuration of Hypercorn's main process, if this is a child of it."""
    config = getattr(multiprocessing.current_process(), "_kwargs", {}).get("config")
    child = multiprocessing.parent_process() is not None
    return config if child and isinstance(config, Config) else None
