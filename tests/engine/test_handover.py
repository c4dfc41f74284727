"""A prompt that another engine computes is continued as if it had been computed here."""

import dataclasses
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from inferneo_jax.config import MeshShape
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.handover import DecodeEngine, PrefillServer
from inferneo_jax.errors import ConfigError, OverloadedError
from inferneo_jax.request import GenerationRequest
from inferneo_jax.runner import runner
from inferneo_jax.scheduler.prefill import PrefillPlanner, PrefillShapes
from inferneo_jax.scheduler.scheduler import DataParallelScheduler
from inferneo_jax.scheduler.sequence import prompt_hashes
from tests.support.tiny_model import (
    MIXED,
    TINY_ENGINE,
    Collected,
    close_all,
    compiled,
    make_runner,
    prompt,
    submit,
)
from tests.support.waiting import until

TOKEN = "a token of sixteen letters or more"
IDENTITY = {"model": "tiny"}
LONG = 40
"""Tokens of a prompt that is handed over in several pieces."""


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_PIECE_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def prefill(small_pieces: None) -> Iterator[Engine]:
    yield from _engine()


@pytest.fixture(scope="module")
def decode(small_pieces: None) -> Iterator[Engine]:
    yield from _engine()


def _engine() -> Iterator[Engine]:
    engine = Engine(compiled(make_runner(TINY_ENGINE)))
    yield engine
    until(lambda: held(engine) == (0, 0, 0))
    assert engine.stats().compiles_after_ready == 0
    engine.stop()


def held(engine: Engine) -> tuple[int, int, int]:
    stats = engine.stats()
    return stats.slots_used, stats.pages_used, stats.waiting


@pytest.fixture
def served(prefill: Engine) -> Iterator[int]:
    """The port at which prompts are computed."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = PrefillServer(prefill, listener, TOKEN, IDENTITY)
    yield listener.getsockname()[1]
    server.close()


@pytest.fixture
def decoder(decode: Engine, served: int) -> Iterator[DecodeEngine]:
    """The engine that decodes, once it has found the one that prefills."""
    made = DecodeEngine(decode, [("127.0.0.1", served)], TOKEN, IDENTITY)
    until(lambda: made.stats().ready)
    yield made
    made.disconnect()
    assert made.stats().waiting == 0


def ask(engine: Engine | DecodeEngine, salt: str = "") -> list[Collected]:
    """A request of each kind, one after the other, so that nothing is evicted between."""
    return [
        submit(engine, prompt(LONG - 8 + i, seed=i), cache_salt=salt.encode(), **fields).wait()  # type: ignore[arg-type]
        for i, fields in enumerate(MIXED)
    ]


def test_handed_over_equals_computed_here(
    prefill: Engine, decode: Engine, decoder: DecodeEngine
) -> None:
    expected = ask(decode, "not to be found")
    before, computed = prefill.stats().prompt_tokens, decode.stats().prompt_tokens
    found = ask(decoder)
    close_all(expected, found)
    # Who wants its prompt's scores computes it; of the others, what fills no page is left.
    handed = [each for each in found if each.request.prompt_logprobs is None]
    lengths = [len(each.request.prompt) for each in found]
    assert [each.outputs[0].cached_tokens for each in handed] == [
        (len(each.request.prompt) - 1) // 4 * 4 for each in handed
    ]
    assert prefill.stats().prompt_tokens - before == sum(lengths[:-1])
    left = sum((length - 1) % 4 + 1 for length in lengths[:-1]) + lengths[-1]
    assert decode.stats().prompt_tokens - computed == left


def test_requests_at_once_are_answered_as_alone(decode: Engine, decoder: DecodeEngine) -> None:
    # More than fit into either cache: some blocks are evicted on the way, and computed.
    prompts = [prompt(LONG, seed=60 + i) for i in range(8)]
    found = [submit(decoder, each, logprobs=1) for each in prompts]
    for each in found:
        each.wait()
    expected = [submit(decode, each, logprobs=1, cache_salt=b"alone").wait() for each in prompts]
    close_all(expected, found)


def test_another_salt_finds_nothing(decode: Engine, decoder: DecodeEngine) -> None:
    submit(decoder, prompt(LONG, seed=20), 2, cache_salt=b"mine").wait()
    other = submit(decode, prompt(LONG, seed=20), 2, cache_salt=b"yours").wait()
    assert other.outputs[0].cached_tokens == 0


def test_a_request_that_is_aborted_while_its_prompt_is_computed(
    prefill: Engine, decoder: DecodeEngine
) -> None:
    with all_slots_taken(prefill):
        waiting = submit(decoder, prompt(LONG, seed=21))
        until(lambda: prefill.stats().waiting == 1)
        assert decoder.stats().waiting == 1
        decoder.abort(waiting.request.id)
        assert waiting.finish_reason == "abort"
        until(lambda: prefill.stats().waiting == 0)
    assert decoder.stats().waiting == 0
    assert len(submit(decoder, prompt(LONG, seed=21)).tokens) == 12


@contextmanager
def all_slots_taken(engine: Engine) -> Iterator[None]:
    """While it is open, requests that decode no further hold all slots of an engine."""
    holding = [submit(engine, prompt(3, seed=30 + i), 50) for i in range(TINY_ENGINE.slots)]
    for each in holding:
        engine.pause(each.request.id)
    until(lambda: engine.stats().slots_used == TINY_ENGINE.slots)
    yield
    for each in holding:
        engine.abort(each.request.id)
        each.wait()


def test_what_is_computed_for_a_decode_engine_that_is_gone_is_given_up(
    prefill: Engine, decoder: DecodeEngine
) -> None:
    with all_slots_taken(prefill):
        lost = submit(decoder, prompt(LONG, seed=22))
        until(lambda: prefill.stats().waiting == 1)
        decoder.disconnect()
        assert lost.finish_reason == "error"
        until(lambda: prefill.stats().waiting == 0)


@pytest.mark.parametrize(
    ("token", "identity", "said"),
    [
        ("another token of sixteen letters", IDENTITY, "both must have the same token"),
        (TOKEN, {"model": "other"}, "has model 'tiny', and this engine 'other'"),
    ],
)
def test_engines_that_do_not_fit_are_not_connected(
    decode: Engine,
    served: int,
    token: str,
    identity: dict[str, str],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stranger = DecodeEngine(decode, [("127.0.0.1", served)], token, identity)
    until(lambda: said in caplog.text)
    with pytest.raises(OverloadedError, match="no prefill engine is connected"):
        submit(stranger, prompt(LONG))
    assert len(submit(stranger, prompt(4)).tokens) == 12  # nothing to hand over
    stranger.disconnect()


def test_several_ranks_hand_nothing_over() -> None:
    two = dataclasses.replace(TINY_ENGINE, mesh=MeshShape(data=2, model=1))
    with pytest.raises(ConfigError, match="data=1"):
        make_runner(two).prepare_handover()


def test_without_room_nothing_is_cached() -> None:
    scheduler = DataParallelScheduler(
        1,
        slots=1,
        num_blocks=9,
        block_len=4,
        planner=PrefillPlanner(PrefillShapes.of((8,), slots=1, overhead=2)),
    )
    hashes = prompt_hashes(GenerationRequest(id="x", prompt=prompt(41), max_tokens=1), 4)
    assert len(hashes) == 10
    assert scheduler.cache_blocks(hashes[:9], 0) == []
    assert scheduler.cached_blocks(hashes) == []
    assert len(scheduler.cache_blocks(hashes[:6], 0)) == 6
    found = scheduler.cached_blocks(hashes)
    assert len(found) == 6
    assert scheduler.cache_blocks(hashes[:8], 7) == []  # of no use without those before it
    assert scheduler.cache_blocks(hashes[:8], 4)[:2] == [None] * 2  # they are there already
    assert scheduler.cached_blocks(hashes)[:6] == found
    assert scheduler.counts()["pages_used"] == 0
    assert scheduler.counts()["pages_cached"] == 8
