"""Who may join a job, and which jobs there cannot be."""

import dataclasses
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from inferneo_jax.distributed import job
from inferneo_jax.distributed.job import Job, accept, connect
from inferneo_jax.distributed.transport import Kind
from inferneo_jax.errors import ConfigError, JobError
from tests.distributed.process_groups import CONFIG, SOON, TOKEN, Threads


def test_followers_join_and_strangers_do_not(
    threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        accepting = threads.start(accept, listener, CONFIG, 2)
        silent = socket.create_connection((host, port))
        rude = socket.create_connection((host, port))
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
        wrong = dataclasses.replace(CONFIG, token="another, just as long")
        with pytest.raises(JobError, match=r"leader refused this process.*token must be the same"):
            connect(host, port, wrong, 1)
        with pytest.raises(JobError, match="number of its own"):
            connect(host, port, CONFIG, 3)
        ends = [connect(host, port, CONFIG, 2)]
        with pytest.raises(JobError, match="leader refused"):
            connect(host, port, CONFIG, 2)
        ends.append(connect(host, port, CONFIG, 1))
        found = accepting.result(SOON)
    assert sorted(found) == [1, 2]
    assert "which does not know the job's token" in caplog.text
    assert "says that it is process 3" in caplog.text
    for each in (*found.values(), *ends, silent, rude):
        each.close()


class Slow(threading.Condition):
    """The thread that accepts takes the lock late, and the one that admits takes it again later."""

    def __init__(self) -> None:
        super().__init__()
        self._takes: dict[int, int] = {}

    def __enter__(self) -> bool:
        thread = threading.get_ident()
        self._takes[thread] = self._takes.get(thread, 0) + 1
        if thread == threading.main_thread().ident:
            time.sleep(0.1)
        elif self._takes[thread] == 2:
            time.sleep(0.3)
        return super().__enter__()


def test_who_is_admitted_before_anybody_waits_for_it_stays_connected(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        joining = threads.start(connect, *listener.getsockname(), CONFIG, 1)
        slow = SimpleNamespace(Condition=Slow, Thread=threading.Thread)
        monkeypatch.setattr(job, "threading", slow)
        found = accept(listener, CONFIG, 1)
        follower = joining.result(SOON)
    follower.send(Kind.BEAT)
    assert found[1].receive() == (Kind.BEAT, b"")
    for each in (found[1], follower):
        each.close()


def test_who_does_not_come_is_named() -> None:
    config = dataclasses.replace(CONFIG, connect_seconds=0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(JobError, match=r"processes \[1, 2\] did not connect within 0.1 s"),
    ):
        accept(listener, config, 2)


@pytest.mark.parametrize(("leads", "number"), [(True, 1), (False, 0)])
def test_only_process_0_serves(leads: bool, number: int) -> None:
    address = {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": number}
    with pytest.raises(JobError, match="process 0 is the one that serves HTTP"):
        Job(dataclasses.replace(CONFIG, **address), leads=leads).join()


def test_a_job_runs_one_language_model() -> None:
    one = Job(CONFIG, leads=True)
    one.take("one")
    with pytest.raises(ConfigError, match="runs one language model: one or two"):
        one.take("two")
    assert one.lost is None
    one.end()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": "short"}, "token must have at least 16 characters"),
        ({"coordinator": "host"}, "coordinator is 'host'; write it as host:port"),
        ({"coordinator": "host:99999"}, "write it as host:port"),
        ({"coordinator": "host:1"}, "needs num_processes and process_id"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id is 2 and"),
        ({"coordinator": "host:1", "num_processes": 1, "process_id": 0}, "must be at least 2"),
    ],
)
def test_a_job_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(CONFIG, **changes)


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(CONFIG)
