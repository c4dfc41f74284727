"""The link between the processes of a job: who may join it, what they agree on, how it is lost."""

import contextlib
import dataclasses
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from inferneo_jax import models
from inferneo_jax.config import JobConfig
from inferneo_jax.engine import Engine
from inferneo_jax.errors import ConfigError, EngineFailedError, JobError
from inferneo_jax.lockstep.channel import Channel, Kind
from inferneo_jax.lockstep.follow import follow
from inferneo_jax.lockstep.job import Job, accept, connect
from inferneo_jax.lockstep.peers import Link, agree
from inferneo_jax.lockstep.wire import Wire
from inferneo_jax.runner import Runner
from tests.support import MIXED, TINY, TINY_ENGINE, prompt, submit, tiny_weights

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


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    made._pool.shutdown()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ends = [Channel(each, CONFIG.lost_seconds) for each in _connected()]
    yield ends[0], ends[1]
    for each in ends:
        each.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


class Links:
    """A leader and its followers in this process, and why each was lost."""

    def __init__(self, followers: int) -> None:
        self.reasons: list[list[str]] = [[] for _ in range(followers + 1)]
        self.left: list[str] = []
        ends = [_connected() for _ in range(followers)]
        self.raw = [theirs for _, theirs in ends]
        leader = {i + 1: Channel(mine, CONFIG.lost_seconds) for i, (mine, _) in enumerate(ends)}
        self.all = [self._link(0, leader)]
        for i, theirs in enumerate(self.raw):
            self.all.append(self._link(i + 1, {0: Channel(theirs, CONFIG.lost_seconds)}))

    def _link(self, number: int, channels: dict[int, Channel]) -> Link:
        return Link(
            channels,
            process_id=number,
            beat_seconds=CONFIG.beat_seconds,
            load_seconds=CONFIG.load_seconds,
            on_lost=self.reasons[number].append,
            on_leave=self.left.append,
        )

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < deadline, self.reasons
            time.sleep(0.005)


@contextlib.contextmanager
def links(followers: int = 1) -> Iterator[Links]:
    made = Links(followers)
    try:
        yield made
    finally:
        for each in made.all:
            each.close()


def test_what_is_sent_arrives(pair: tuple[Channel, Channel], threads: Threads) -> None:
    one, other = pair
    payloads = [b"", b"x", bytes(range(256)) * 20_000]
    sent = threads.start(lambda: [one.send(Kind.STEP, each[:7], each[7:]) for each in payloads])
    assert [other.receive() for _ in payloads] == [(Kind.STEP, each) for each in payloads]
    sent.result(SOON)


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("!BI", 3, 2**31), b"\0" * 9]
)
def test_what_is_no_frame_is_refused(sent: bytes) -> None:
    mine, theirs = _connected()
    channel = Channel(mine, 1)
    theirs.sendall(sent)
    with pytest.raises(JobError, match="does not speak the protocol"):
        channel.receive()
    channel.close()
    theirs.close()


def test_both_sides_prove_that_they_know_the_token(
    pair: tuple[Channel, Channel], threads: Threads
) -> None:
    leader, follower = pair
    proving = threads.start(follower.prove, TOKEN, 7)
    assert leader.challenge(TOKEN) == 7
    leader.welcome()
    proving.result(SOON)


def test_a_leader_without_the_token_is_refused(
    pair: tuple[Channel, Channel], threads: Threads
) -> None:
    leader, follower = pair
    proving = threads.start(follower.prove, TOKEN, 1)
    leader.send(Kind.PROOF, b"n" * 32)
    leader.receive()
    leader.send(Kind.PROOF, b"t" * 32)
    with pytest.raises(JobError, match="leader does not know the job's token"):
        proving.result(SOON)


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


def test_who_does_not_come_is_named() -> None:
    config = dataclasses.replace(CONFIG, connect_seconds=0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(JobError, match=r"processes \[1, 2\] did not connect within 0.1 s"),
    ):
        accept(listener, config, 2)


def test_all_learn_what_each_says(threads: Threads) -> None:
    with links(3) as made:
        work = [lambda n=n: made.all[n].exchange("numbers", [n, "x"]) for n in range(4)]
        assert threads.all(*work) == [[[n, "x"] for n in range(4)]] * 4


def test_what_differs_is_named_on_every_side(threads: Threads) -> None:
    with links(2) as made:

        def compare(number: int) -> str:
            fields = {"slots": 8 if number == 2 else 4, "mesh": (1, 2)}
            with pytest.raises(JobError) as caught:
                agree(made.all[number], "settings", fields)
            return str(caught.value)

        for told in threads.all(*(lambda n=n: compare(n) for n in range(3))):
            assert "slots is 8 in process 2 and 4 in process 0. Give" in told


def test_who_is_elsewhere_or_late_is_named(threads: Threads) -> None:
    with links() as made:
        leader, follower = made.all
        threads.start(lambda: follower.exchange("weights", 1)).add_done_callback(
            lambda done: done.exception()
        )
        with pytest.raises(JobError, match="process 1 is at 'weights' and process 0 at 'programs'"):
            leader.exchange("programs", 1)
        with pytest.raises(JobError, match=r"process 1 did not come along within 0.05 s"):
            leader.exchange("programs", 1, 0.05)
        leader.close()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_dies_is_noticed_at_once(gone: int, threads: Threads) -> None:
    with links(2) as made:
        waiting = threads.start(made.all[1 - gone].exchange, "never", 0)
        for channel in made.all[gone]._channels.values():
            channel.close()  # as the kernel does
        made.until(lambda: made.reasons[1 - gone])
        with pytest.raises(JobError, match=f"process {gone} of the job closed the connection"):
            waiting.result(SOON)
        with pytest.raises(JobError, match="closed the connection"):
            made.all[1 - gone].announce(Kind.RESET)
        assert made.all[1 - gone].lost == made.reasons[1 - gone][0]
        assert len(made.reasons[1 - gone]) == 1


def test_a_process_that_says_nothing_is_lost() -> None:
    mine, theirs = _connected()
    reasons: list[str] = []
    lost = threading.Event()

    def note(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    link = Link(
        {1: Channel(mine, 0.3)},
        process_id=0,
        beat_seconds=0.05,
        load_seconds=5,
        on_lost=note,
    )
    assert lost.wait(SOON)
    assert reasons == ["process 1 of the job was not heard of for 0.3 s"]
    link.close()
    theirs.close()


def test_an_idle_job_lives() -> None:
    with links(2) as made:
        time.sleep(1.5 * CONFIG.lost_seconds)
        assert not any(made.reasons)


def test_a_follower_says_why_it_ends() -> None:
    with links() as made:
        made.all[1].announce(Kind.LEAVE)
        made.until(lambda: made.left)
        assert made.left == ["process 1 was told to end"]
        assert made.all[0].lost is None
        made.all[1].announce(Kind.FAILED, b"no memory")
        made.until(lambda: made.reasons[0])
        assert made.reasons[0] == ["process 1 of the job failed: no memory"]


def test_an_end_in_order_is_no_loss(threads: Threads) -> None:
    with links(2) as made:

        def obey(link: Link) -> None:
            assert link.next() == (Kind.STOP, b"")
            link.announce(Kind.STOP)
            link.close()

        threads.all(
            lambda: made.all[0].end(SOON),
            lambda: obey(made.all[1]),
            lambda: obey(made.all[2]),
        )
        made.all[0].close()
        time.sleep(3 * CONFIG.beat_seconds)
        assert not any(made.reasons)
        assert not any(link.lost for link in made.all)


def test_every_step_arrives_as_it_was(tiny_runner: Callable[..., Runner]) -> None:
    programs = tiny_runner()._programs
    wire, other = Wire(programs), Wire(programs)
    rng = np.random.default_rng(0)
    keys = programs.keys()
    for key in keys:
        empty = programs.host_arguments(key)
        sent = jax.tree.map(lambda x: rng.integers(0, 2, x.shape).astype(x.dtype), empty)
        found, got = other.read(b"".join(wire.write(key, sent)))
        assert found == key
        jax.tree.map(np.testing.assert_array_equal, got, sent)
        assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(empty)]
    with pytest.raises(JobError, match="runs program 999; there are"):
        wire.read(struct.pack("!H", 999))
    with pytest.raises(JobError, match="a step has 3 bytes and its program takes"):
        wire.read(struct.pack("!Hx", 0))


class Lockstep:
    """A leader's engine and a follower of it, each with cache and slots of its own."""

    def __init__(self, made: Links, threads: Threads, compiled: Runner) -> None:
        self.links = made

        def load(number: int) -> Runner:
            runner = Runner(
                TINY, tiny_weights(), TINY_ENGINE, models.REFERENCE, peers=made.all[number]
            )
            runner._compiled = compiled._compiled
            return runner

        self.leader, self.follower = threads.all(lambda: load(0), lambda: load(1))
        self.engine = Engine(self.leader)
        self.following = threads.start(follow, self.follower, made.all[1])

    def end(self) -> None:
        self.engine.stop()
        answered = threading.Thread(target=lambda: self.links.all[0].end(SOON))
        answered.start()
        self.following.result(SOON)
        self.links.all[1].announce(Kind.STOP)
        answered.join(SOON)

    def same(self) -> None:
        """The follower's slots and pages are the leader's, bit for bit."""
        for mine, theirs in zip(
            jax.tree.leaves((self.leader._state, self.leader._cache)),
            jax.tree.leaves((self.follower._state, self.follower._cache)),
            strict=True,
        ):
            np.testing.assert_array_equal(mine, theirs)


@pytest.fixture
def lockstep(threads: Threads, tiny_runner: Callable[..., Runner]) -> Iterator[Lockstep]:
    compiled = tiny_runner()
    with links() as made:
        yield Lockstep(made, threads, compiled)


def test_a_follower_does_what_the_leader_does(
    lockstep: Lockstep, tiny_engine: Callable[..., Engine]
) -> None:
    def ask(engine: Engine) -> list[list[int]]:
        sent = [submit(engine, prompt(9, seed=i // 2), **fields) for i, fields in enumerate(MIXED)]
        return [each.tokens for each in sent]

    assert ask(lockstep.engine) == ask(tiny_engine())
    lockstep.end()
    lockstep.same()


def test_a_failed_step_is_forgotten_by_both(
    lockstep: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, write = lockstep.engine, Wire.write
    expected = submit(engine, prompt(9), 20).tokens

    def explode(self: Wire, key: Any, arguments: Any) -> Any:
        monkeypatch.setattr(Wire, "write", write)
        raise RuntimeError("out of something")

    monkeypatch.setattr(Wire, "write", explode)
    lost = submit(engine, prompt(5), 20)
    assert isinstance(lost.wait().outputs[-1].error, EngineFailedError)
    assert submit(engine, prompt(9), 20).tokens == expected
    lockstep.end()
    lockstep.same()


def test_a_step_of_which_the_follower_has_no_part_cannot_be_forgotten(
    lockstep: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the leader's part for ever, and so does not answer."""
    engine, hold = lockstep.engine, threading.Event()
    monkeypatch.setattr(lockstep.leader, "step_seconds", 0.3)
    monkeypatch.setattr(lockstep.follower, "execute", lambda *_: hold.wait(SOON))

    def explode(*_: Any) -> None:
        raise RuntimeError("the device hiccups")

    monkeypatch.setattr(lockstep.leader, "execute", explode)
    assert isinstance(submit(engine, prompt(5)).wait().outputs[-1].error, EngineFailedError)
    lockstep.links.until(lambda: not engine.stats().ready)
    with pytest.raises(EngineFailedError):
        submit(engine, prompt(5))
    hold.set()
    engine.stop()
    lockstep.links.all[0].close()
    with pytest.raises(JobError):
        lockstep.following.result(SOON)


def test_requests_end_when_a_follower_is_lost_whatever_the_step_does(
    lockstep: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, engine, hold = lockstep.links, lockstep.engine, threading.Event()
    made.reasons[0].clear()
    execute = lockstep.leader.execute

    def hang(*arguments: Any) -> Any:
        reached.set()
        hold.wait(SOON)
        return execute(*arguments)

    reached = threading.Event()
    monkeypatch.setattr(lockstep.leader, "execute", hang)
    monkeypatch.setattr(made.all[0], "_on_lost", engine.fail)
    crowd = [submit(engine, prompt(5, seed=i), 50) for i in range(6)]
    assert reached.wait(SOON)
    began = time.monotonic()
    made.all[1].close()
    for each in crowd:
        error = each.wait().outputs[-1].error
        assert isinstance(error, EngineFailedError)
        assert "process 1 of the job closed the connection" in str(error)
        assert len(each.outputs) == 1
    assert time.monotonic() - began < 2
    assert not engine.stats().ready
    with pytest.raises(EngineFailedError, match="process 1 of the job"):
        submit(engine, prompt(5))
    hold.set()
    engine.stop()
    with pytest.raises(JobError):
        lockstep.following.result(SOON)


def test_a_job_runs_one_language_model() -> None:
    job = Job(CONFIG, leads=True)
    job.take("one")
    with pytest.raises(ConfigError, match="runs one language model: one or two"):
        job.take("two")
    assert job.lost is None
    job.end()


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
