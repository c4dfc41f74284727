"""A follower's cache and slots are its leader's, bit for bit, whatever befalls either."""

import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from inferneo_jax.distributed.transport import Kind
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.follower import follow
from inferneo_jax.errors import EngineFailedError, JobError
from inferneo_jax.runner.runner import Runner
from inferneo_jax.runner.wire import Wire
from tests.distributed.process_groups import SOON, ProcessGroups, Threads, process_groups
from tests.support.machine_speed import Machine
from tests.support.tiny_model import MIXED, make_runner, prompt, submit


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

    def __init__(self, made: ProcessGroups, threads: Threads, compiled: Runner) -> None:
        self.process_groups = made

        def load(number: int) -> Runner:
            runner = make_runner(processes=made.all[number])
            runner._compiled = compiled._compiled
            return runner

        self.leader, self.follower = threads.all(lambda: load(0), lambda: load(1))
        self.engine = Engine(self.leader)
        self.following = threads.start(follow, self.follower, made.all[1])

    def end(self) -> None:
        self.engine.stop()
        answered = threading.Thread(target=lambda: self.process_groups.all[0].end(SOON))
        answered.start()
        self.following.result(SOON)
        self.process_groups.all[1].announce(Kind.STOP)
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
    with process_groups() as made:
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
    lockstep.process_groups.until(lambda: not engine.stats().ready)
    with pytest.raises(EngineFailedError):
        submit(engine, prompt(5))
    hold.set()
    engine.stop()
    lockstep.process_groups.all[0].close()
    with pytest.raises(JobError):
        lockstep.following.result(SOON)


def test_requests_end_when_a_follower_is_lost_whatever_the_step_does(
    lockstep: Lockstep, monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    made, engine, hold = lockstep.process_groups, lockstep.engine, threading.Event()
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
    assert time.monotonic() - began < machine.seconds(2)
    assert not engine.stats().ready
    with pytest.raises(EngineFailedError, match="process 1 of the job"):
        submit(engine, prompt(5))
    hold.set()
    engine.stop()
    with pytest.raises(JobError):
        lockstep.following.result(SOON)
