"""What fails, hangs or does not fit ends what it must, and nothing else."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from inferneo_jax.config import EngineConfig
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.served import EmbeddingModel
from inferneo_jax.errors import (
    ConfigError,
    EngineFailedError,
    EngineStoppedError,
    OverloadedError,
)
from inferneo_jax.model import load_model
from inferneo_jax.platform import memory
from inferneo_jax.platform.watchdog import Heartbeat
from inferneo_jax.request import GenerationOutput, GenerationRequest
from inferneo_jax.runner.programs import Key
from inferneo_jax.runner.runner import PendingStep, Runner
from inferneo_jax.scheduler.scheduler import SchedulerOutputs
from inferneo_jax.weights.convert import convert
from tests.support.machine_speed import Machine
from tests.support.paths import FAMILIES
from tests.support.tiny_model import GREEDY, ONE_DEVICE, MakeEngine, make_runner, prompt, submit
from tests.support.waiting import until

SOON = 0.4
"""Seconds after which a step hangs."""


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    expected = submit(engine, prompt(9), 20).tokens
    run = Runner.run

    def explode_once(self: Runner, scheduled: SchedulerOutputs) -> PendingStep:
        if len(scheduled[0].decode) == 4:
            monkeypatch.setattr(Runner, "run", run)
            raise RuntimeError("the device hiccups")
        return run(self, scheduled)

    monkeypatch.setattr(Runner, "run", explode_once)
    lost = [submit(engine, prompt(5, seed=i), 50) for i in range(4)]
    waiting = [submit(engine, prompt(9), 20) for _ in range(2)]
    for collected in lost:
        error = collected.wait().outputs[-1].error
        assert isinstance(error, EngineFailedError)
        assert isinstance(error.__cause__, RuntimeError)
    assert [collected.tokens for collected in waiting] == [expected, expected]
    assert waiting[0].outputs[0].cached_tokens == 0
    assert engine.stats().ready


def test_an_engine_that_keeps_failing_gives_up(
    tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()

    def explode(self: Runner, scheduled: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Runner, "run", explode)
    for _ in range(3):
        collected = submit(engine, prompt(5)).wait()
        assert isinstance(collected.outputs[-1].error, EngineFailedError)
    engine.stop()
    assert engine.ended()
    assert not engine.stats().ready
    with pytest.raises(EngineFailedError):
        submit(engine, prompt(5))


def test_a_raising_sink_harms_nobody_else(tiny_engine: MakeEngine) -> None:
    engine = tiny_engine()

    def raising(output: GenerationOutput) -> None:
        raise ValueError("reader at fault")

    request = GenerationRequest(id="bad", prompt=prompt(4), max_tokens=5, sampling=GREEDY)
    engine.submit(request, raising)
    assert len(submit(engine, prompt(5)).tokens) == 12


class Gate:
    """Holds a function up at its first call from ``shut`` on, until it is opened."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._shut = self.reached = False
        self._opened = threading.Event()

    def shut(self) -> None:
        self._shut = True

    def open(self) -> None:
        self._shut = False
        self._opened.set()

    def __call__(self, *args: Any) -> Any:
        if self._shut:
            self.reached = True
            assert self._opened.wait(30)
        return self._function(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """At the end of every step, where its results are read."""
    made = Gate(PendingStep.wait)
    monkeypatch.setattr(PendingStep, "wait", lambda step: made(step))
    return made


@pytest.fixture
def hanging(
    tiny_runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine whose steps must end soon."""
    runner = tiny_runner()
    monkeypatch.setattr(runner, "step_seconds", SOON)
    engine = Engine(runner)
    yield engine
    engine.stop()
    stats = engine.stats()
    assert (stats.slots_used, stats.pages_used, stats.waiting) == (0, 0, 0)


def test_a_step_that_hangs_ends_every_request_and_the_engine_comes_back(
    hanging: Engine, gate: Gate, machine: Machine
) -> None:
    engine, expected = hanging, submit(hanging, prompt(9), 20).tokens
    gate.shut()
    began = time.monotonic()
    crowd = [submit(engine, prompt(5, seed=i), 50) for i in range(7)]
    for collected in crowd:
        assert isinstance(collected.wait().outputs[-1].error, EngineFailedError)
    assert time.monotonic() - began < machine.seconds(SOON + 3)
    assert not engine.stats().ready
    assert engine.stuck() >= 0
    until(lambda: engine.stuck() > 0.2)
    with pytest.raises(OverloadedError, match="does not answer"):
        submit(engine, prompt(4))
    gate.open()
    until(lambda: engine.stats().ready)
    assert engine.stuck() == 0
    stats = engine.stats()
    assert (stats.slots_used, stats.pages_used, stats.waiting) == (0, 0, 0)
    assert submit(engine, prompt(9), 20).tokens == expected
    assert all(len(collected.outputs) == 1 for collected in crowd)


def test_an_engine_that_is_being_rebuilt_has_not_ended(
    tiny_engine: MakeEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    reset = Gate(Runner.reset)
    monkeypatch.setattr(Runner, "reset", lambda runner: reset(runner))
    gate.shut()
    reset.shut()
    submit(engine, prompt(5), 50)
    until(lambda: gate.reached)
    assert engine._heartbeat.condemn()
    gate.open()
    until(lambda: reset.reached)
    assert (engine.stuck(), engine.stats().ready, engine.ended()) == (0, False, False)
    reset.open()
    until(lambda: engine.stats().ready)
    assert not engine.ended()
    assert len(submit(engine, prompt(9), 20).tokens) == 20


def test_an_engine_that_hangs_can_be_stopped(hanging: Engine, gate: Gate) -> None:
    gate.shut()
    collected = submit(hanging, prompt(5), 50)
    until(lambda: gate.reached)
    hanging.stop()
    assert isinstance(collected.wait().outputs[-1].error, (EngineStoppedError, EngineFailedError))
    with pytest.raises(EngineStoppedError):
        submit(hanging, prompt(5))
    gate.open()
    until(lambda: not hanging._thread.is_alive())


def test_an_idle_engine_does_not_hang(hanging: Engine) -> None:
    time.sleep(2 * SOON)
    assert hanging.stats().ready
    assert hanging.stuck() == 0
    assert len(submit(hanging, prompt(5), 50).tokens) == 50


def test_time_that_nobody_saw_pass_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.1, 5000.0, 5000.1, *[5000.2] * 10_000])
    monkeypatch.setattr("inferneo_jax.platform.watchdog.time.monotonic", lambda: next(clock))
    hung = threading.Event()
    heartbeat = Heartbeat("test", 2.0, hung.set)
    with heartbeat:
        assert not hung.wait(2.0)
        assert heartbeat.late() == 0.0
    heartbeat.stop()


def test_only_the_step_that_was_late_is_condemned() -> None:
    steps, condemned = [1], []

    class Lock:
        """Whenever the watcher lets go of it, a late step ends and the next one begins."""

        def __init__(self) -> None:
            self._lock = threading.RLock()

        def __enter__(self) -> None:
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()
            watching = threading.current_thread() is heartbeat._watcher
            if watching and heartbeat._age > heartbeat.limit and len(steps) == 1:
                steps.append(2)
                with suppress(EngineFailedError):
                    heartbeat.__exit__(None, None, None)
                heartbeat.__enter__()
                done.set()

    done = threading.Event()
    heartbeat = Heartbeat("test", 0.2, lambda: condemned.append(steps[-1]))
    heartbeat.__enter__()
    heartbeat._lock = Lock()  # type: ignore[assignment]
    assert done.wait(60)
    heartbeat.stop()
    heartbeat._watcher.join()
    assert condemned[:1] == [1]


def test_a_round_of_embeddings_that_hangs_ends_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(dtype="float32", max_len=16, mesh=ONE_DEVICE)
    model = load_model(convert(FAMILIES / "bert", tmp_path / "bert"), config, name="bert")
    assert isinstance(model, EmbeddingModel)
    embedder = model.embedder
    embedder._heartbeat.limit = SOON
    expected = embedder.embed([[1, 2, 3]]).result(10)
    gate = Gate(embedder._round)
    monkeypatch.setattr(embedder, "_round", gate)
    gate.shut()
    crowd: list[Future[Any]] = [embedder.embed([[1, 2, 3]], str(i)) for i in range(4)]
    for future in crowd:
        with pytest.raises(EngineFailedError):
            future.result(SOON + 5)
    until(lambda: embedder.stuck() > 0)
    with pytest.raises(OverloadedError):
        embedder.embed([[1]])
    gate.open()
    until(lambda: embedder.stuck() == 0 and not embedder._hung)
    assert np.array_equal(embedder.embed([[1, 2, 3]]).result(10), expected)

    gate = Gate(embedder._round)  # one that hangs can be stopped
    monkeypatch.setattr(embedder, "_round", gate)
    gate.shut()
    crowd = [embedder.embed([[1]]) for _ in range(3)]
    model.stop()
    for future in crowd:
        with pytest.raises((EngineStoppedError, EngineFailedError)):
            future.result(5)
    gate.open()
    until(lambda: not embedder._thread.is_alive())


def runner(**changes: Any) -> Runner:
    sizes = {"slots": 2, "page_len": 4, "kv_tokens": 64, "mesh": ONE_DEVICE}
    return make_runner(EngineConfig(**(sizes | changes)))


def test_a_cache_that_does_not_fit_is_refused_with_what_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"KV cache of \d+ tokens.* GB .*Lower slots or max_len"):
        runner(kv_tokens=10**12)


def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert(FAMILIES / "llama-tied", tmp_path / "tiny")
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"the weights would take 0.0 GB and 0.0 GB"):
        load_model(folder, EngineConfig(), name="tiny")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
    ],
)
def test_memory_that_runs_out_is_explained(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: object) -> None:
        raise error

    def compile_all(self: Runner, keys: Iterable[Key], _: object = None) -> None:
        self._compiled |= dict.fromkeys(keys, allocate)

    monkeypatch.setattr(Runner, "_compile", compile_all)
    with pytest.raises(ConfigError, match=r"memory ran out while the KV cache of"):
        runner()


def test_other_errors_of_the_device_stay_what_they_are() -> None:
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory.oom_as_config_error("tested"),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.parametrize("names", memory._LIMITS)
def test_the_control_groups_limit_counts(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    before = memory.total_memory()
    for name, value in zip(names, ("5000000", "2000000"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(value + "\n")
    assert (memory.total_memory(), memory.free_memory()) == (5_000_000, 3_000_000)
    (tmp_path / names[0]).write_text("max\n")
    assert memory.total_memory() == before
