"""Pulls of a process of their own, which can be killed at any time.

Run as a program: ``puller.py STORE NAME [CATALOG PIP]``. Each line on stdin starts a pull in a
fork, so that everything is imported once only; its process id is printed, then how it ended.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def killed_pulls(
    kills: int, longest: float, *arguments: object, **environment: str
) -> Iterator[None]:
    """Start a pull and kill it after 0 to ``longest`` seconds, so many times; yield after each."""
    rng = random.Random(1)
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.support.puller", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
        bufsize=1,
    )
    with program:
        assert program.stdin is not None
        assert program.stdout is not None
        for _ in range(kills):
            program.stdin.write("\n")
            pid = int(program.stdout.readline())
            time.sleep(rng.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)  # it stays a zombie until we read how it ended
            program.stdin.write("\n")
            status = int(program.stdout.readline())
            assert status in (0, -signal.SIGKILL), status
            yield
        program.stdin.close()


def main() -> None:
    import huggingface_hub.hf_api  # noqa: F401 - so that no fork spends its time on it

    from inferneo_jax.weights.catalog import load_catalog
    from inferneo_jax.weights.fetch import pull

    store, name, *more = sys.argv[1:]
    catalog = load_catalog(Path(more[0])) if more else None
    if more:
        sys.executable = more[1]
    while sys.stdin.readline():
        pid = os.fork()
        if not pid:
            pull(name, Path(store), catalog=catalog)
            os._exit(0)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
