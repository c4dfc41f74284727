"""A leader and its followers in one process, over real connections."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from inferneo_jax.config import JobConfig
from inferneo_jax.distributed.process_group import TcpProcessGroup
from inferneo_jax.distributed.transport import Channel
from tests.support.waiting import until

TOKEN = "a token of the tests"
CONFIG = JobConfig(
    token=TOKEN, connect_seconds=5, load_seconds=5, beat_seconds=0.05, lost_seconds=1, end_seconds=5
)
SOON = 5.0


class Threads:
    """Runs functions side by side; each must end in time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(8)

    def start(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        return self._pool.submit(function, *args)

    def all(self, *functions: Callable[[], Any]) -> list[Any]:
        return [future.result(20) for future in [self.start(each) for each in functions]]


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


class ProcessGroups:
    """A leader and its followers in this process, and why each was lost."""

    def __init__(self, followers: int, lost_seconds: float) -> None:
        self.reasons: list[list[str]] = [[] for _ in range(followers + 1)]
        self.left: list[str] = []
        ends = [connected() for _ in range(followers)]
        self.raw = [theirs for _, theirs in ends]
        leader = {i + 1: Channel(mine, lost_seconds) for i, (mine, _) in enumerate(ends)}
        self.all = [self._processes(0, leader)]
        for i, theirs in enumerate(self.raw):
            self.all.append(self._processes(i + 1, {0: Channel(theirs, lost_seconds)}))

    def _processes(self, number: int, channels: dict[int, Channel]) -> TcpProcessGroup:
        return TcpProcessGroup(
            channels,
            process_id=number,
            beat_seconds=CONFIG.beat_seconds,
            load_seconds=CONFIG.load_seconds,
            on_lost=self.reasons[number].append,
            on_leave=self.left.append,
        )

    def until(self, condition: Callable[[], Any]) -> None:
        until(condition, SOON, lambda: self.reasons)


@contextlib.contextmanager
def process_groups(
    followers: int = 1, *, lost_seconds: float = CONFIG.lost_seconds
) -> Iterator[ProcessGroups]:
    made = ProcessGroups(followers, lost_seconds)
    try:
        yield made
    finally:
        for each in made.all:
            each.close()
