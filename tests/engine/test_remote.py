"""An engine in a process of its own does what one in this process does, and its end is noticed."""

import dataclasses
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest

from inferneo_jax.engine import remote, wire
from inferneo_jax.engine.remote import EngineProcess, RemoteEmbedder, RemoteEngine, State
from inferneo_jax.engine.served import EmbeddingModel, LanguageModel
from inferneo_jax.errors import (
    CheckpointError,
    ConfigError,
    ConstraintError,
    ContextLengthError,
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    InferneoError,
    RequestError,
)
from inferneo_jax.model import load_model
from inferneo_jax.request import (
    Constraint,
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
)
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.text.grammar import regex_constraint
from inferneo_jax.weights.convert import describe
from tests.support.tiny_checkpoints import CHAT, EMBEDDING, tiny_checkpoints
from tests.support.tiny_model import EIGHT_SLOTS, MIXED, Collected, close, prompt, submit
from tests.support.waiting import until

CONFIG = dataclasses.replace(EIGHT_SLOTS, dtype="float32", kv_tokens=64_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoints")
    tiny_checkpoints(made)
    return made


@pytest.fixture(scope="module")
def process() -> Iterator[EngineProcess]:
    made = EngineProcess()
    yield made
    made.end()
    assert made.lost == "the engine was stopped"


@pytest.fixture(scope="module")
def model(folder: Path, process: EngineProcess) -> LanguageModel:
    return cast(LanguageModel, process.load(folder / CHAT, CONFIG, name="tiny"))


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[LanguageModel]:
    loaded = load_model(folder / CHAT, CONFIG, name="tiny")
    assert isinstance(loaded, LanguageModel)
    yield loaded
    loaded.stop()


@pytest.fixture(scope="module")
def encoder(folder: Path, process: EngineProcess) -> EmbeddingModel:
    return cast(EmbeddingModel, process.load(folder / EMBEDDING, CONFIG, name="bert"))


def _runs(model: LanguageModel) -> list[Collected]:
    """Of each kind of request, one after the other, so that both engines find the same cached."""
    return [
        submit(model.engine, prompt(9 + i, seed=i), **fields).wait()
        for i, fields in enumerate(MIXED)
    ]


def test_remote_equals_embedded(model: LanguageModel, here: LanguageModel) -> None:
    assert (model.max_len, model.created) == (here.max_len, here.created)
    assert model.info == here.info
    for there, ours in zip(_runs(model), _runs(here), strict=True):
        close(there, ours)
        first, other = there.outputs[0], ours.outputs[0]
        assert (first.prompt_logprobs is None) == (other.prompt_logprobs is None)
        if first.prompt_logprobs and other.prompt_logprobs:
            assert first.prompt_logprobs[0] is other.prompt_logprobs[0] is None
            for a, b in zip(first.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
                assert a is not None
                assert b is not None
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        for output in there.outputs:
            assert output.cached_tokens == other.cached_tokens
            assert output.admitted_at == first.admitted_at


def test_a_grammar_is_followed_in_the_other_process(
    model: LanguageModel, here: LanguageModel
) -> None:
    valid, invalid = regex_constraint("[ab]{3}!"), Constraint(grammar="start: x")
    ends = here.tokenizer.eos_token_ids
    for each in (model, here):
        found = submit(each.engine, prompt(5), 9, constraint=valid, stop_token_ids=ends)
        assert re.fullmatch("[ab]{3}!", each.tokenizer.decode(found.tokens))
        refused = submit(each.engine, prompt(5), 9, constraint=invalid)
        assert isinstance(refused.wait().outputs[-1].error, ConstraintError)
        with pytest.raises(ConstraintError, match="not JSON"):
            each.grammars.compile(invalid)


def test_vectors_equal_those_computed_here(folder: Path, encoder: EmbeddingModel) -> None:
    loaded = load_model(folder / EMBEDDING, CONFIG, name="bert")
    assert isinstance(loaded, EmbeddingModel)
    texts = [[2, 5, 3], [2, 9, 9, 7, 3], [2, 3]]
    ours = loaded.embedder.embed(texts).result(60)
    there = encoder.embedder.embed(texts).result(60)
    loaded.stop()
    assert there.dtype == np.float32
    np.testing.assert_allclose(there, ours, atol=1e-5)


def test_figures_are_those_of_the_end_of_a_request(model: LanguageModel) -> None:
    for _ in range(20):
        before = model.engine.stats().output_tokens
        submit(model.engine, prompt(8), 5).wait()
        stats = model.engine.stats()
        assert (stats.output_tokens, stats.slots_used) == (before + 5, 0)


def test_an_aborted_request_ends_and_gives_its_place_back(model: LanguageModel) -> None:
    run = submit(model.engine, prompt(8), 400, id="long")
    run.wait_for_tokens(3)
    model.engine.abort("long")
    model.engine.abort("nobody's")
    assert run.finish_reason == "abort"
    assert run.count() < 400
    assert model.engine.stats().slots_used == 0


def test_a_paused_request_waits_for_its_reader(model: LanguageModel) -> None:
    run = submit(model.engine, prompt(8), 300, id="slow")
    run.wait_for_tokens(3)
    model.engine.pause("slow")
    # A request that begins later and ends proves that steps go on, without this one.
    submit(model.engine, prompt(5), 4).wait()
    before = run.count()
    submit(model.engine, prompt(6), 20).wait()
    assert run.count() == before < 300
    model.engine.resume("slow")
    assert len(run.tokens) == 300


def test_what_is_wrong_with_a_request_is_raised_when_it_is_submitted(model: LanguageModel) -> None:
    with pytest.raises(RequestError, match="token id 99999"):
        submit(model.engine, (5, 99_999))
    with pytest.raises(ContextLengthError):
        submit(model.engine, prompt(8), 100_000)
    run = submit(model.engine, prompt(8), 300, id="twice")
    with pytest.raises(RequestError, match="twice is already under way"):
        submit(model.engine, prompt(8), id="twice")
    model.engine.abort("twice")
    run.wait()


def test_what_is_wrong_with_texts_is_told(encoder: EmbeddingModel) -> None:
    with pytest.raises(RequestError, match="input 1 is empty") as caught:
        encoder.embedder.embed([[2, 3], []]).result(60)
    assert caught.value.param == "input"


def test_texts_that_nobody_waits_for_are_dropped(encoder: EmbeddingModel) -> None:
    others = [encoder.embedder.embed([[2, 5, 3]] * 50) for _ in range(20)]
    assert others[-1].cancel()
    with pytest.raises(CancelledError):
        others[-1].result(60)
    assert all(other.result(60).shape[0] == 50 for other in others[:-1])


def test_a_model_that_cannot_be_loaded_is_told_as_it_would_be_here(
    folder: Path, process: EngineProcess, model: LanguageModel
) -> None:
    missing = folder / "nothing"
    with pytest.raises(CheckpointError) as there:
        process.load(missing, CONFIG, name="nothing")
    with pytest.raises(CheckpointError) as here:
        load_model(missing, CONFIG, name="nothing")
    assert str(there.value) == str(here.value)
    huge = dataclasses.replace(CONFIG, kv_tokens=10**12)
    with pytest.raises(ConfigError, match="memory"):
        process.load(folder / CHAT, huge, name="huge")
    assert submit(model.engine, prompt(8), 4).tokens  # and nobody else is harmed


def test_a_models_files_are_described_there(
    folder: Path, process: EngineProcess, tmp_path: Path
) -> None:
    found = process.obtain("x", folder / "source", tmp_path)
    assert found == describe(folder / "source", tmp_path)
    with pytest.raises(CheckpointError):
        process.obtain("x", tmp_path / "nothing", tmp_path)


def test_progress_is_told(folder: Path, process: EngineProcess) -> None:
    stages = []
    loaded = process.load(folder / CHAT, CONFIG, name="again", progress=lambda *s: stages.append(s))
    loaded.stop()
    assert loaded.ended()
    assert {"loading"} <= {stage for stage, _, _ in stages}
    with pytest.raises(EngineStoppedError):
        submit(cast(LanguageModel, loaded).engine, prompt(8))


def test_the_end_of_the_process_ends_every_request(folder: Path) -> None:
    process = EngineProcess()
    chat = cast(LanguageModel, process.load(folder / CHAT, CONFIG, name="tiny"))
    texts = cast(EmbeddingModel, process.load(folder / EMBEDDING, CONFIG, name="bert"))
    run = submit(chat.engine, prompt(8), 20_000)
    run.wait_for_tokens(3)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    assert run.finish_reason == "error"
    assert isinstance(run.outputs[-1].error, EngineFailedError)
    until(lambda: process.lost)
    assert process.lost == "the engine's process ended with code -9"
    assert chat.ended()
    assert texts.ended()
    assert not chat.ready()
    with pytest.raises(EngineFailedError, match="-9"):
        submit(chat.engine, prompt(8))
    with pytest.raises(EngineFailedError, match="-9"):
        texts.embedder.embed([[2, 3]])
    with pytest.raises(EngineFailedError, match="-9"):
        process.load(folder / CHAT, CONFIG, name="tiny")
    chat.stop()
    process.end()


def test_a_request_that_is_submitted_at_the_end_of_the_process_ends_too(
    model: LanguageModel,
) -> None:
    class Process:
        lost: str | None = None

        def silence(self) -> float:
            return 0.0

        def put(self, *_: object) -> None:
            pass

    process: Any = Process()
    engine = RemoteEngine(process, 0, State(stats=model.stats()), cast(Any, model.engine)._limits)
    ends = threading.Thread(target=lambda: engine.fail(EngineFailedError("gone")))

    def number() -> Iterator[int]:
        process.lost = "gone"  # the check is over, and the request is not there yet
        ends.start()
        ends.join(0.1)
        yield 0

    cast(Any, engine)._numbers = number()
    run = submit(engine, prompt(8))
    ends.join()
    assert run.finish_reason == "error"


def test_a_process_that_cannot_start_is_told() -> None:
    process = EngineProcess(("/bin/false",))
    with pytest.raises(EngineFailedError, match="ended with code 1"):
        process.load(Path("/nowhere"), CONFIG, name="tiny")
    process.end()


def test_a_process_that_stands_still_counts_as_stuck_until_it_goes_on(
    process: EngineProcess, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 1.0)
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    try:
        until(lambda: model.stuck() > 0)
        with pytest.raises(EngineError, match="does not answer"):
            submit(model.engine, prompt(8))
    finally:
        os.kill(process.pid, signal.SIGCONT)
    until(lambda: model.stuck() == 0)
    assert len(submit(model.engine, prompt(8), 4).tokens) == 4


def test_the_forecast_knows_the_requests_of_this_process(model: LanguageModel) -> None:
    for _ in range(8):
        submit(model.engine, prompt(8), 30).wait()
    mine = GenerationRequest(id="later", prompt=prompt(8), max_tokens=30)
    assert model.engine.forecast([mine]) is None  # slots are free
    runs = [submit(model.engine, prompt(8), 3000, id=f"busy-{i}") for i in range(20)]
    until(lambda: model.engine.forecast([mine]))
    for run in runs:
        model.engine.abort(run.request.id)
    assert all(run.finish_reason == "abort" for run in runs)


def test_messages_say_the_same_on_the_other_side() -> None:
    request = GenerationRequest(
        id="a",
        prompt=(1, 2, 3),
        max_tokens=4,
        sampling=SamplingParams(seed=2**64 - 1, logit_bias={7: -0.1}, temperature=1 / 3),
        stop_token_ids=frozenset({4, 5}),
        logprobs=2,
        prompt_logprobs=0,
        cache_salt=b"\xff\x00",
        constraint=regex_constraint("a|é"),
    )
    assert wire.read_request(orjson.loads(wire.pack(request))) == request
    assert wire.read_config(orjson.loads(wire.pack(CONFIG))) == CONFIG
    for error in (EngineFailedError("gone"), ContextLengthError("long", "prompt")):
        again = wire.read_error(orjson.loads(wire.pack(error)))
        assert (type(again), str(again)) == (type(error), str(error))
        assert vars(again) == vars(error)
    found: list[GenerationOutput] = []
    sequence = Sequence(request, found.append, 0)
    outputs = [
        GenerationOutput(
            token_ids=(7,),
            logprobs=(TokenLogprob(7, -0.1, ((7, -0.1), (9, float("-inf")))),),
            prompt_logprobs=(None, TokenLogprob(2, -1 / 3), TokenLogprob(3, -2.0)),
            cached_tokens=2,
            admitted_at=12.5,
        ),
        GenerationOutput(token_ids=(8, 9), cached_tokens=2, admitted_at=12.5),
        GenerationOutput(
            finish_reason="error", error=EngineFailedError("x"), cached_tokens=2, admitted_at=12.5
        ),
    ]
    for i, output in enumerate(outputs):
        written = wire.write_output(0, 0, output, first=i == 0)
        wire.deliver(sequence, *orjson.loads(wire.pack(written))[2:])
    assert found[:2] == outputs[:2]
    assert isinstance(found[2].error, InferneoError)
    assert sequence.num_sampled == 3


def test_both_kinds_of_engine_are_remote(model: LanguageModel, encoder: EmbeddingModel) -> None:
    assert isinstance(model.engine, RemoteEngine)
    assert isinstance(encoder.embedder, RemoteEmbedder)
    assert model.device_memory() == []  # a CPU's is not counted
