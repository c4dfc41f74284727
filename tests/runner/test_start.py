"""A start: what it runs, compiles and reads, and what it leaves for later."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from inferneo_jax import model as loading
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.served import LanguageModel
from inferneo_jax.layers.sampler import Sampling
from inferneo_jax.model import load_model
from inferneo_jax.runner.compile_cache import ExecutableStore
from inferneo_jax.runner.programs import (
    Decode,
    Key,
    Prefill,
    Programs,
    Sample,
    Score,
    ScorePrompt,
    Verify,
)
from inferneo_jax.runner.runner import Runner
from inferneo_jax.weights.convert import describe
from tests.support.model_files import LLAMA, random_tensors, write_gguf
from tests.support.tiny_model import GREEDY, TINY_ENGINE, make_runner, mixed, prompt, submit

MANY = dataclasses.replace(TINY_ENGINE, row_buckets=(2, 4), draft_rows=4, speculation="auto")
"""An engine with more programs than a start needs."""
TIMES = {"prefill": [(4.0, 0.1), (8.0, 0.2)], "slowest": 0.2, "draft_cost": 2.0}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model in a GGUF file, described."""
    file = write_gguf(tmp_path / "tiny.gguf", LLAMA, random_tensors(LLAMA))
    return describe(file, tmp_path / "checkpoints")


def test_weights_are_read_while_programs_are_compiled(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, read = threading.Event(), loading.load_weights

    def lower(*_: Any) -> Any:
        compiling.set()
        raise RuntimeError("stop here")

    def load(*arguments: Any) -> list[jax.Array]:
        assert compiling.wait(60)
        return read(*arguments)

    monkeypatch.setattr(loading, "load_weights", load)
    monkeypatch.setattr(Programs, "lower", lower)
    config = dataclasses.replace(TINY_ENGINE, compilation_cache=None)
    with pytest.raises(RuntimeError, match="stop here"):
        load_model(checkpoint, config, name="tiny")


def test_a_failed_load_leaves_the_programs_that_are_not_begun(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, failed, lower = [], threading.Event(), Programs.lower

    def slow(self: Programs, key: Any) -> Any:
        lowered.append(key)
        assert failed.wait(60)
        return lower(self, key)

    def fail(*_: Any) -> list[jax.Array]:
        while not lowered:
            time.sleep(0.01)
        failed.set()
        raise RuntimeError("the file is gone")

    monkeypatch.setattr(loading, "load_weights", fail)
    monkeypatch.setattr(Programs, "lower", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    config = dataclasses.replace(MANY, compilation_cache=None)
    with pytest.raises(RuntimeError, match="the file is gone"):
        load_model(checkpoint, config, name="tiny")
    assert len(lowered) <= 2


def test_a_start_compiles_what_can_stand_in_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Key] = []
    compile_all = ExecutableStore.compile_all

    def counted(store: ExecutableStore, programs: Any, progress: Any) -> Any:
        asked.extend(programs)
        return compile_all(store, programs, progress)

    monkeypatch.setattr(ExecutableStore, "compile_all", counted)
    runner = make_runner(MANY)
    runner.compile()
    first = set(runner._compiled)
    sampling = {Sample(4, Sampling.GREEDY), Sample(4, Sampling.SHAPED), Score(4)}
    assert {Decode(4), Verify(4, 6), Prefill(1, 4), Prefill(1, 8), *sampling} <= first
    assert {ScorePrompt(4), ScorePrompt(8)} <= first
    assert not first & {Decode(2), Verify(2, 6), Prefill(2, 4), Sample(4, Sampling.DRAWN)}
    runner.warm_up()
    engine = Engine(runner)
    try:
        assert engine.stats().prefill_allowance > 0
        found = mixed(engine)
        before = [(each.tokens, each.logprobs) for each in found]
        assert set(runner._compiled) == first  # nobody compiled what was not there
        runner.compile_rest()
        assert set(runner._compiled) == set(runner._programs.all_keys())
        assert len(asked) == len(runner._compiled)  # each once
        assert [(each.tokens, each.logprobs) for each in mixed(engine)] == before
        assert engine.stats().compiles_after_ready == 0
    finally:
        engine.stop()


def test_where_all_are_compiled_first_all_have_run_before_the_first_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Runner, "_defers", False)
    runner = make_runner(MANY)
    runner.compile()
    ran = []

    def noted(key: Key) -> Callable[..., Any]:
        program = runner._compiled[key]

        def run(*arguments: Any) -> Any:
            ran.append(key)
            return program(*arguments)

        return run

    runner._compiled = {key: noted(key) for key in runner._compiled}
    runner.warm_up()
    programs = runner._programs
    assert set(ran) == set(programs.all_keys()) - set(programs.cache_keys())


def test_a_request_does_not_wait_for_a_program_that_is_being_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decode of one row is served by the program for four until the smaller one is there."""
    config = dataclasses.replace(TINY_ENGINE, row_buckets=(2, 4), prefill_chunks=(8,))
    runner = make_runner(dataclasses.replace(config, compilation_cache=None))
    runner.compile()
    runner.warm_up()
    held, used, lower, execute = threading.Event(), [], Programs.lower, Runner.execute

    def hold(self: Programs, key: Any) -> Any:
        assert held.wait(60)
        return lower(self, key)

    def note(self: Runner, key: Any, arguments: Any) -> Any:
        used.append(key)
        return execute(self, key, arguments)

    monkeypatch.setattr(Programs, "lower", hold)
    monkeypatch.setattr(Runner, "execute", note)
    engine = Engine(runner)
    rest = threading.Thread(target=runner.compile_rest)
    rest.start()
    try:
        first = submit(engine, prompt(5), 6, sampling=GREEDY).tokens
        assert Decode(4) in used
        assert Decode(2) not in used
        held.set()
        rest.join()
        assert submit(engine, prompt(5), 6, sampling=GREEDY).tokens == first
        assert Decode(2) in used
    finally:
        held.set()
        engine.stop()


def test_the_rest_is_left_when_the_model_ends(checkpoint: Path) -> None:
    model = load_model(checkpoint, MANY, name="tiny")
    assert isinstance(model, LanguageModel)
    model.stop()
    assert model.compiling
    assert not model.compiling.is_alive()


def _never() -> Mapping[str, Any]:
    raise AssertionError("measured again")


def _times_of(runner: Runner, measure: Callable[[], Any]) -> Any:
    return runner._store.measured("times", measure)


def test_what_was_measured_is_kept_for_a_week(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_ENGINE, compilation_cache=str(tmp_path))
    assert _times_of(make_runner(config), lambda: TIMES) == TIMES
    kept = json.loads(json.dumps(TIMES))
    assert _times_of(make_runner(config), _never) == kept
    changed = dataclasses.replace(config, prefill_chunks=(8,))
    with pytest.raises(AssertionError, match="measured again"):
        _times_of(make_runner(changed), _never)
    (file,) = tmp_path.glob("*.times")
    for damage in (
        b"",
        file.read_bytes()[:-3],
        json.dumps({"measured": time.time() - 8 * 86_400, "figures": TIMES}).encode(),
    ):
        file.write_bytes(damage)
        with pytest.raises(AssertionError, match="measured again"):
            _times_of(make_runner(config), _never)
    assert _times_of(make_runner(config), lambda: TIMES) == TIMES
    assert _times_of(make_runner(config), _never) == kept


def test_a_later_start_times_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(MANY, compilation_cache=str(tmp_path))
    first = make_runner(config)
    first.compile()
    first.warm_up()
    monkeypatch.setattr(Runner, "_measure", _never)
    later = make_runner(config)
    later.compile()
    later.warm_up()
    assert later.speculation == first.speculation
    assert later.prefill_times.seconds(8) == first.prefill_times.seconds(8) > 0


def test_a_start_from_a_file_imports_nothing_that_only_others_need(checkpoint: Path) -> None:
    """Other formats, conversion and planning bring in packages that take a second and 200 MB."""
    code = (
        "import sys; from pathlib import Path; import server.application;"
        "from inferneo_jax import EngineConfig, load_model;"
        f"model = load_model(Path({str(checkpoint)!r}), EngineConfig(kv_tokens=512,"
        " prefill_chunks=(8,), row_buckets=(4,), slots=4), name='tiny');"
        "model.stop();"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )
    imported = set(done.stdout.split())
    assert {"jax", "tokenizers"} <= imported
    heavy = {"transformers", "orbax", "tensorstore", "sentencepiece", "safetensors", "torch"}
    assert not imported & heavy
