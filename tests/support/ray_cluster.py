"""Replicas behind Ray Serve on this machine, with their own Redis, as child processes of a test."""

import contextlib
import json
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.keys.key import Limits
from server.keys.store.open import open_store
from tests.support.key_stores import redis_server
from tests.support.keyed_server import FREE, add_key, bearer
from tests.support.server_process import environment, free_address

SERVE = Path(sys.executable).with_name("serve")
STOP_SECONDS = 45.0
_LINE = re.compile(r"\(ServeReplica:\S+ pid=(\d+)\) (\{.*\})")


class Replicas:
    """What ``serve run`` started; ``url`` and ``ws`` are those of Serve's proxy.

    Attributes:
        popen: the process of ``serve run``.
        log: what it and the replicas wrote.
        redis: the URL of the store of keys.
    """

    def __init__(
        self, command: list[str], port: int, log: Path, redis: str, settings: dict[str, str]
    ) -> None:
        self.url, self.ws = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"
        self.log, self.redis = log, redis
        with log.open("a") as out:
            self.popen = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment(settings)
            )

    def key(self, limits: Limits = FREE) -> dict[str, str]:
        """The headers of a new key."""
        store = open_store(self.redis)
        _, text = add_key(store, limits)
        store.close()
        return bearer(text)

    def tail(self) -> str:
        """The end of what the replicas and Serve wrote."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if "(pid=)" not in line)[-6000:]

    def events(self, event: str) -> list[tuple[int, dict[str, Any]]]:
        """Lines of the servers' logs so far: the process and what it said."""
        found = []
        for pid, text in _LINE.findall(self.log.read_text(errors="replace")):
            with contextlib.suppress(ValueError):  # not whole yet
                if (facts := json.loads(text)).get("event") == event:
                    found.append((int(pid), facts))
        return found

    def ready_pids(self) -> list[int]:
        """The processes that have been ready so far, in that order."""
        return list(dict.fromkeys(pid for pid, _ in self.events("ready")))

    def wait_replicas(self, count: int, seconds: float) -> None:
        """Return once so many have become ready in all."""
        deadline = time.monotonic() + seconds
        while len(self.ready_pids()) < count:
            assert self.popen.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.2)

    def wait_ready(self, seconds: float) -> None:
        """Return once Serve's proxy reaches a replica that can serve."""
        deadline = time.monotonic() + seconds
        while not self._ready():
            assert self.popen.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.05)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """End them all; how many processes had to be killed for it."""
        family = _living(self.popen.pid)
        self.popen.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(STOP_SECONDS)
        _, left = psutil.wait_procs(family, timeout=5)
        left = [each for each in left if each.is_running()]
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, timeout=5)
        return sum(each.is_running() and each.status() != "zombie" for each in left)


def _living(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def replicas(folder: Path, settings: dict[str, str]) -> Iterator[Replicas]:
    """Two of them on CPU, being started; Serve listens on a loopback address."""
    port = int(free_address().rpartition(":")[2])
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "inferneo", "import_path": "server.replicas:app"}],
    }
    (folder / "serve.json").write_text(json.dumps(config))
    with redis_server(folder) as redis, tempfile.TemporaryDirectory() as ray:  # short: for sockets
        variables = {
            "JAX_PLATFORMS": "cpu",
            "RAY_TMPDIR": ray,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else it leaves one in the home folder
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_COLOR_PREFIX": "0",
            "INFERNEO_LOG_FORMAT": "json",
            "INFERNEO_REPLICAS": "2",
            "INFERNEO_KEYS_DB": redis,
        }
        server = Replicas(
            [str(SERVE), "run", str(folder / "serve.json")],
            port,
            folder / "log",
            redis,
            variables | settings,
        )
        try:
            yield server
        finally:
            assert server.stop() == 0
