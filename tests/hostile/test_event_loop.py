"""No request makes the event loop compute for long, whatever its shape or its answer's."""

import json
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from websockets.sync.client import connect

from inferneo_jax import Tokenizer
from tests.hostile.corpus import GOOD, LARGE
from tests.hostile.loop import CallbackMeter
from tests.hostile.resident import PeakMemory, resident
from tests.support.fake_engine import writes
from tests.support.fake_server import Rig
from tests.support.machine_speed import Machine

pytestmark = pytest.mark.alone

JSON = {"Content-Type": "application/json"}
LONGEST = 0.05
"""Seconds of CPU time of one callback, on a core with nothing else to do.

What made the loop pause took several times as long.
"""
ROUNDS = 3
EMPTY = {"role": "user", "content": ""}
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def dumped(path: str, **changes: Any) -> bytes:
    return json.dumps(GOOD[path] | changes).encode()


def large_bodies() -> Iterator[tuple[str, str, bytes]]:
    """Bodies near the size limit that reach validation, or the model: name, path, body."""
    messages = [EMPTY] * 10_000
    unknown = {f"name{i}": 1 for i in range(99_000)}
    nested: Any = 1
    for _ in range(900):
        nested = {"a": nested}
    yield "empty messages", CHATS, dumped(CHATS, messages=messages)
    yield "empty messages to tokenize", "/tokenize", dumped("/tokenize", messages=messages)
    yield "metadata", CHATS, dumped(CHATS, metadata=unknown)
    yield "nested tools", CHATS, dumped(CHATS, chat_template_kwargs={"tools": [nested] * 90})
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"a": 1}] * 30_000}]
    yield "tool calls", CHATS, dumped(CHATS, messages=calls)
    yield "long stops", COMPLETIONS, dumped(COMPLETIONS, stop=["x" * 1024] * 16)
    yield "long suffix", COMPLETIONS, dumped(COMPLETIONS, suffix="x" * LARGE)
    yield "biases", COMPLETIONS, dumped(COMPLETIONS, logit_bias={str(i): 1 for i in range(10_000)})
    yield "ids", COMPLETIONS, dumped(COMPLETIONS, prompt=[1] * 90_000, echo=True)
    yield "many prompts", COMPLETIONS, dumped(COMPLETIONS, prompt=["x" * 15_000] * 256)
    yield "a text", COMPLETIONS, dumped(COMPLETIONS, prompt="x" * LARGE)
    yield "a text to tokenize", "/tokenize", dumped("/tokenize", prompt="x " * (LARGE // 2))
    yield "ids to write out", "/detokenize", dumped("/detokenize", tokens=[1] * (LARGE // 3))
    inputs = ["x" * 30] * 2048
    yield "many inputs", "/v1/embeddings", dumped("/v1/embeddings", input=inputs)
    for path in (*GOOD, "/admin/keys"):
        body = json.dumps(GOOD.get(path, {"name": "x"}) | unknown).encode()
        yield f"unknown names to {path}", path, body
    wrong = {"name": "x", "models": [1] * 10**6, "scopes": [1] * 10**5}
    yield "validation errors", "/admin/keys", json.dumps(wrong).encode()
    errors = {"stop_token_ids": ["x"] * 500_000, "temperature": "x", "n": "x", "seed": []}
    yield "more validation errors", COMPLETIONS, dumped(COMPLETIONS, **errors)


def longest(rig: Rig, path: str, body: bytes, bound: float) -> float:
    """The longest callback of a request, the best of a few tries: only noise differs."""
    times = []
    for _ in range(ROUNDS):
        with CallbackMeter(rig.server.loop) as meter:
            answer = rig.client.post(path, content=body, headers=JSON, timeout=60)
        assert answer.status_code in (200, 400, 403), answer.text[:500]
        assert meter.num_callbacks > 5
        times.append(meter.longest)
        if times[-1] < bound:
            break
    return min(times)


def test_no_body_makes_the_loop_pause(rig: Rig, machine: Machine) -> None:
    paused = {}
    for name, path, body in large_bodies():
        bound = machine.seconds(LONGEST)
        took = longest(rig, path, body, bound)
        print(f"{name:40} {len(body):8} bytes {took * 1000:7.1f} ms")
        if took >= bound:
            paused[name] = took
    assert not paused


SCORED = {
    "chat": (CHATS, {"n": 256, "max_tokens": 32, "logprobs": True, "top_logprobs": 20}),
    "completions": (COMPLETIONS, {"n": 256, "max_tokens": 32, "logprobs": 20}),
    "stream": (COMPLETIONS, {"n": 256, "max_tokens": 32, "logprobs": 20, "stream": True}),
    "echo": (COMPLETIONS, {"prompt": "x" * 20_000, "echo": True, "logprobs": 20}),
    "streamed echo": (
        COMPLETIONS,
        {"prompt": "x" * 20_000, "echo": True, "logprobs": 20, "stream": True},
    ),
    "echoes": (COMPLETIONS, {"prompt": "x" * 1000, "n": 16, "echo": True, "logprobs": 20}),
    "stops": (
        COMPLETIONS,
        {
            "n": 256,
            "max_tokens": 64,
            "ignore_eos": True,
            "stop": ["the END is not nearer" * 48] * 16,
        },
    ),
    "long prompts": (COMPLETIONS, {"prompt": [1] * 90_000, "n": 64, "max_tokens": 1}),
}


@pytest.mark.parametrize("name", SCORED)
def test_no_answer_makes_the_loop_pause(
    rig: Rig, tokenizer: Tokenizer, machine: Machine, name: str
) -> None:
    path, changes = SCORED[name]
    rig.engine.script = writes(tokenizer, "the END is not near", end=False)
    took = longest(rig, path, dumped(path, **changes), machine.seconds(LONGEST))
    print(f"{name:20} {took * 1000:7.1f} ms")
    assert took < machine.seconds(LONGEST)


def test_no_frame_makes_the_loop_pause(rig: Rig, tokenizer: Tokenizer, machine: Machine) -> None:
    rig.engine.script = writes(tokenizer, "the END is not near", end=False)
    path, changes = SCORED["chat"]
    frames = [dumped(path, **changes), dumped(CHATS, messages=[EMPTY] * 10_000)]
    with connect(rig.ws + CHATS, max_size=None) as ws:
        for frame in frames:
            times = []
            for _ in range(ROUNDS):
                with CallbackMeter(rig.server.loop) as meter:
                    ws.send(frame.decode())
                    assert "choices" in orjson.loads(ws.recv(60))
                times.append(meter.longest)
            print(f"frame of {len(frame):8} {min(times) * 1000:7.1f} ms")
            assert min(times) < machine.seconds(LONGEST)


def test_an_answer_takes_little_more_memory_than_its_text(rig: Rig, tokenizer: Tokenizer) -> None:
    """At its peak one that was built in one go took seven times as much."""
    path, changes = SCORED["chat"]
    rig.engine.script = writes(tokenizer, "the END is not near", end=False)
    body = dumped(path, **changes)
    factors, kept = [], []
    for _ in range(ROUNDS + 1):
        before, size = resident(), 0
        with (
            PeakMemory() as memory,
            rig.client.stream("POST", path, content=body, headers=JSON, timeout=60) as answer,
        ):
            for part in answer.iter_raw():
                size += len(part)
        assert size > 5_000_000
        factors.append((memory.peak - before) / size)
        kept.append(resident() - before)
    print(f"{size} bytes; at the peak times {min(factors):.1f}; kept {min(kept)}")
    assert min(factors) < 5
    assert min(kept) < before / 20
