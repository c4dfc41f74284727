"""Runs a function in processes of its own, which are killed at any time.

Run as a program: ``killed.py MODULE FUNCTION ARGUMENTS``. Each line on stdin starts the function in
a fork, so that everything is imported once only; its process id is printed, then how it ended.
"""

import contextlib
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO

KILLS = int(os.environ.get("INFERNEO_TEST_KILLS", "6"))
"""Number of kills in each test of them."""


def killed_runs(
    kills: int,
    longest: float | None,
    function: Callable[..., None],
    *arguments: object,
    **environment: str,
) -> Iterator[None]:
    """Start a function and kill it after a random time, ``kills`` times; yield after each.

    Args:
        kills: number of runs.
        longest: seconds after which it is killed at the latest. Without it, those that it takes;
            there is a run before the others then, and one after them, that is not killed.
        function: at the top of its module; it takes texts.
        arguments: given to it as texts.
        environment: variables that it has besides ours.
    """
    rng = random.Random(1)
    with _program(function, arguments, environment) as (stdin, stdout):

        def run(seconds: float | None) -> None:
            stdin.write("\n")
            pid = int(stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                os.kill(pid, signal.SIGKILL)  # it stays a zombie until we read how it ended
            stdin.write("\n")
            status = int(stdout.readline())
            assert status == 0 or (status == -signal.SIGKILL and seconds is not None), status

        within = longest
        if within is None:
            start = time.monotonic()
            run(None)
            within = time.monotonic() - start
            yield
        for _ in range(kills):
            run(rng.uniform(0, within))
            yield
        if longest is None:
            run(None)
            yield


@contextlib.contextmanager
def _program(
    function: Callable[..., None], arguments: tuple[object, ...], environment: dict[str, str]
) -> Iterator[tuple[IO[str], IO[str]]]:
    command = ["-m", "tests.support.killed", function.__module__, function.__name__]
    program = subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
        bufsize=1,
    )
    with program:
        assert program.stdin is not None
        assert program.stdout is not None
        yield program.stdin, program.stdout
        program.stdin.close()


def main() -> None:
    module, name, *arguments = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    while sys.stdin.readline():
        pid = os.fork()
        if not pid:
            sys.stdout = sys.stderr
            function(*arguments)
            os._exit(0)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
